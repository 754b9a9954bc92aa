"""Plugins: one really installed from its own distribution, and ones passed to the engine."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paged_backend import Engine, EngineConfig, InvalidArgument, Overloaded, SamplingParams
from paged_backend.plugins import hookimpl
from paged_backend.request import Request
from paged_backend.stats import StepStats

EXAMPLE = Path(__file__).parent / "plugins" / "paged_backend_example"
PARAMS = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)

USE_THE_PLUGIN = """
import json

import paged_backend_example
from transformers import LlamaConfig, LlamaForCausalLM

from paged_backend import Engine, EngineConfig, SamplingParams

model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
)
config = EngineConfig(scheduling_policy="shortest-prompt", max_num_seqs=1, num_blocks=64, device="cpu")
engine = Engine(config, model=model.eval())
params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
for name, length in {"long": 30, "short": 3, "middle": 12, "short too": 3, "aborted": 40}.items():
    engine.add_request([1] * length, params, request_id=name)
engine.abort("aborted")
ended = []
while engine.has_work:
    ended += [output.request_id for output in engine.step() if output.finished]
print(json.dumps({"ended": ended, "events": paged_backend_example.events}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """In which the example plugin is installed, beside what this Python has."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(EXAMPLE)], check=True)
    return os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def run(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    ).eval()


def engine_with(model: LlamaForCausalLM, *plugins: object, **config: object) -> Engine:
    return Engine(EngineConfig(num_blocks=64, **config), model=model, plugins=plugins)


def test_installed_policy_and_observer(environment: dict[str, str]) -> None:
    told = json.loads(run(environment, sys.executable, "-c", USE_THE_PLUGIN))
    served = ["short", "short too", "middle", "long"]
    assert told["ended"] == ["aborted", *served]
    events = [tuple(event) for event in told["events"]]
    arrivals = [("arrived", name) for name in ("long", "short", "middle", "short too", "aborted")]
    lives = [(what, name) for name in served for what in ("scheduled", "first token", "finished")]
    assert events == [*arrivals, ("aborted", "aborted"), *lives]


def test_the_command_line_lists_an_installed_plugin(environment: dict[str, str]) -> None:
    shown = run(environment, str(Path(sys.executable).parent / "paged-backend"), "plugins")
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in shown.splitlines() if "│" in line]
    at = next(index for index, row in enumerate(rows) if row[0] == "example")
    assert rows[at] == ["example", "paged_request_arrived", "paged-backend-example 1.0"]
    hooks = [row[1] for row in rows[at : at + 5]]
    assert hooks == [
        "paged_request_arrived",
        "paged_request_ended",
        "paged_request_first_token",
        "paged_request_scheduled",
        "paged_scheduling_policy",
    ]
    assert ["builtin", "paged-backend (built in)"] in [row[::2] for row in rows]


def test_a_policy_is_not_there_without_its_plugin(model: LlamaForCausalLM) -> None:
    with pytest.raises(InvalidArgument, match=r"scheduling_policy='shortest-prompt': no plugin provides it.*builtin"):
        engine_with(model, scheduling_policy="shortest-prompt")


class Raising:
    """Fails wherever it can."""

    @hookimpl
    def paged_request_arrived(self, request: Request) -> None:
        raise ValueError("arrived")

    @hookimpl
    def paged_request_scheduled(self, request: Request) -> None:
        raise ValueError("scheduled")

    @hookimpl
    def paged_request_first_token(self, request: Request) -> None:
        raise ValueError("first token")

    @hookimpl
    def paged_request_ended(self, request: Request) -> None:
        raise ValueError("ended")

    @hookimpl
    def paged_step_ended(self, stats: StepStats) -> None:
        raise ValueError("step")


def test_a_raising_observer_hurts_nobody(model: LlamaForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    steps: list[StepStats] = []

    class Counting:
        @hookimpl
        def paged_step_ended(self, stats: StepStats) -> None:
            steps.append(stats)

    prompts = [[1, 2, 3], [4, 5]]
    plain = engine_with(model)
    expected = [output.token_ids for output in plain.generate(prompts, PARAMS)]
    plain.close()
    with caplog.at_level(logging.ERROR):
        outputs = engine_with(model, Counting(), Raising()).generate(prompts, PARAMS)
    assert [output.token_ids for output in outputs] == expected
    assert [output.finish_reason for output in outputs] == ["length", "length"]
    raised = {str(record.exc_info[1]) for record in caplog.records if record.exc_info}
    assert raised == {"arrived", "scheduled", "first token", "ended", "step"}
    assert sum(step.output_tokens for step in steps) == 6


class Quota:
    """Refuses prompts of more than four tokens, and everything once it is used up."""

    left = 2

    @hookimpl
    def paged_request_filter(self, request: Request) -> None:
        if request.num_prompt_tokens > 4:
            raise InvalidArgument("prompt", request.num_prompt_tokens, "at most 4 tokens on this plan")
        if not self.left:
            raise Overloaded("the quota is used up")
        self.left -= 1


def test_a_filter_refuses_before_anything_is_accepted(model: LlamaForCausalLM) -> None:
    engine = engine_with(model, Quota())
    with pytest.raises(InvalidArgument, match="prompt=5: at most 4 tokens on this plan"):
        engine.add_request([1] * 5, PARAMS)
    assert not engine.has_work
    outputs = engine.generate([[1] * 4, [2]], PARAMS)
    assert [output.num_output_tokens for output in outputs] == [3, 3]
    with pytest.raises(Overloaded, match="the quota is used up"):
        engine.add_request([1], PARAMS)
    assert not engine.has_work
    assert engine.stats().blocks_used == 0
