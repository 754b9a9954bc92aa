"""A busy server for a while: nothing is lost, leaked, mixed up, or slower than in the beginning.

`PAGED_SOAK_SECONDS` says for how long.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import random
import statistics
import time
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from paged_backend import DeadlineExceeded, Engine, EngineConfig, RequestOptions, RequestOutput, SamplingParams
from paged_backend.plugins import hookimpl
from paged_backend.runner.device_runner import DeviceRunner
from paged_backend.stats import StepStats
from tests.gpu.test_engine_gpu import MIDDLE
from tests.tiny import build

SECONDS = float(os.environ.get("PAGED_SOAK_SECONDS", "20"))
LONGEST_PROMPT, LONGEST_OUTPUT = 16000, 400
CONFIG: dict[str, Any] = {
    "num_blocks": 700,  # of 64 tokens: a third of what `max_num_seqs` requests would like to have
    "max_num_seqs": 64,
    "max_model_len": LONGEST_PROMPT + LONGEST_OUTPUT,
    "swap_space_bytes": "16MiB",
}
# In float32, the logits of a batch and of a request alone differ by less than 1e-5 of the largest. Where the tokens
# differ, and only then, the two must be that close to each other, with a margin for long contexts.
NEAR_TIE = 1e-4


class Watch:
    """When each step ended, and what it did."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, StepStats]] = []

    @hookimpl
    def paged_step_ended(self, stats: StepStats) -> None:
        self.steps.append((time.monotonic(), stats))


@dataclass
class Asked:
    prompt: list[int]
    params: SamplingParams
    timeouts: bool
    aborted: bool = False
    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    reasons: dict[int, str] = field(default_factory=dict)


class Soak:
    """Random requests to an engine, and what must hold of each answer."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self.engine, self.rng, self.vocab = engine, random.Random(seed), engine.vocab_size
        self.live: dict[str, Asked] = {}
        self.reasons: Counter[str] = Counter()
        self.num_ended = 0
        self.to_check: list[Asked] = []
        """Of those that end greedy, one in 25."""
        self.prefixes = [self.random_tokens(length) for length in (300, 700, 1500, 4000)]

    def random_tokens(self, length: int) -> list[int]:
        return self.rng.choices(range(3, self.vocab), k=length)

    def up_to(self, longest: int) -> int:
        """From 1 to `longest`, as many of each order of magnitude."""
        return round(math.exp(self.rng.uniform(0, math.log(longest))))

    def ask(self) -> None:
        rng = self.rng
        prompt = self.random_tokens(self.up_to(LONGEST_PROMPT))
        if rng.random() < 0.4:
            prefix = rng.choice(self.prefixes)
            prompt = (prefix[: rng.choice([len(prefix), rng.randint(1, len(prefix))])] + prompt)[:LONGEST_PROMPT]
        length, kind = self.up_to(LONGEST_OUTPUT), rng.random()
        fields: dict[str, Any] = {"max_tokens": length, "ignore_eos": True, "temperature": 0.0}
        if kind < 0.02 and len(prompt) < 1000:
            fields |= {"beam_width": 2, "max_tokens": min(length, 20)}
        elif kind < 0.5:
            fields |= {
                "temperature": rng.uniform(0.1, 2),
                "top_k": rng.choice([0, 0, 1, 5, 40]),
                "top_p": rng.choice([1.0, 1.0, 0.5, 0.95]),
                "min_p": rng.choice([0.0, 0.0, 0.1]),
                "seed": rng.randrange(2**63),
                "n": rng.choice([1, 1, 1, 1, 3]),
            }
        if rng.random() < 0.2:
            fields |= {
                "stop_token_ids": rng.sample(range(self.vocab), 3),
                "min_tokens": rng.randint(0, int(length / 2)),
            }
        if "beam_width" in fields:
            fields["min_tokens"] = 0
        options = RequestOptions()
        if rng.random() < 0.1:
            name = rng.choice(["timeout", "queue_timeout"])
            options = RequestOptions(**{name: rng.uniform(0.001, 0.5)})
        params = SamplingParams(**fields)
        request_id = self.engine.add_request(prompt, params, options)
        self.live[request_id] = Asked(prompt, params, options != RequestOptions())

    def abort(self) -> None:
        request_id = self.rng.choice(list(self.live))
        if self.engine.abort(request_id):
            self.live[request_id].aborted = True

    def step(self) -> None:
        for output in self.engine.step():
            self.take(output)

    def take(self, output: RequestOutput) -> None:
        asked = self.live[output.request_id]
        assert output.index not in asked.reasons, "an output after the last"
        made = asked.tokens[output.index]
        made += output.token_ids
        assert all(0 <= token < self.vocab for token in output.token_ids)
        assert len(made) <= asked.params.max_tokens
        if output.finish_reason is not None:
            asked.reasons[output.index] = output.finish_reason
            stops, least = set(asked.params.stop_token_ids), asked.params.min_tokens
            if output.finish_reason == "error":
                assert asked.timeouts
                assert isinstance(output.error, DeadlineExceeded)
            elif output.finish_reason == "abort":
                assert asked.aborted
            elif output.finish_reason == "length":
                assert len(made) == asked.params.max_tokens
            elif asked.params.beam_width == 1:
                assert made[-1] in stops
                assert len(made) > least
            assert asked.params.beam_width > 1 or not stops & set(made[: max(least, len(made) - 1)])
        if output.finished:
            del self.live[output.request_id]
            self.num_ended += 1
            self.reasons.update(asked.reasons.values())
            greedy = asked.params.temperature == 0 and asked.params.beam_width == 1
            if greedy and asked.reasons[0] in ("length", "stop") and self.rng.random() < 0.04:
                self.to_check.append(asked)

    def serve(self, until: float) -> None:
        """Bursts of requests, faster than they can be served, until then."""
        while time.monotonic() < until:
            if len(self.live) < 120 and self.rng.random() < 0.05:
                for _ in range(self.rng.randint(1, 30)):
                    self.ask()
            if self.live and self.rng.random() < 0.005:
                self.abort()
            if self.engine.has_work:
                self.step()

    def idle(self) -> None:
        """Serve what is left; then every block and slot must be free."""
        while self.engine.has_work:
            self.step()
        assert not self.live
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.blocks_used) == (0, 0, 0)
        assert not self.engine._in_flight
        assert self.engine.tables.num_free_slots == self.engine.config.max_num_seqs
        self.engine.tables.check()


def check_alone(soak: Soak, plain: PreTrainedModel, seconds: float) -> tuple[int, int]:
    """Greedy outputs must be what the engine makes of them alone; returns how many were checked, and near-ties."""
    checked, ties, until = 0, 0, time.monotonic() + seconds
    soak.rng.shuffle(soak.to_check)
    for asked in soak.to_check:
        if time.monotonic() > until:
            break
        soak.engine.reset_prefix_cache()
        alone = soak.engine.generate([asked.prompt], asked.params)[0].token_ids
        checked += 1
        if asked.tokens[0] != alone:
            ties += 1
            at = next(at for at, (a, b) in enumerate(zip(asked.tokens[0], alone, strict=False)) if a != b)
            ids = torch.tensor([asked.prompt + alone[:at]], device=plain.device)
            with torch.inference_mode():
                logits = plain(ids, logits_to_keep=1).logits[0, -1]
            gap = abs(float(logits[asked.tokens[0][at]] - logits[alone[at]]) / float(logits.abs().max()))
            assert gap < NEAR_TIE, f"token {at} of a prompt of {len(asked.prompt)} differs, and not by rounding"
    return checked, ties


def slowdown(steps: list[tuple[float, StepStats]]) -> float:
    """How much longer steps of decodes took in the last quarter than in the second, of about as many rows."""
    began, ended = steps[0][0], steps[-1][0]
    seconds: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for at, stats in steps:
        if stats.num_tokens == stats.num_rows:
            quarter = min(3, int(4 * (at - began) / (ended - began)))
            seconds[quarter][stats.num_rows // 8].append(stats.seconds)
    ratios = [
        statistics.median(seconds[3][rows]) / statistics.median(seconds[1][rows])
        for rows in seconds[3]
        if min(len(seconds[1][rows]), len(seconds[3][rows])) >= 20
    ]
    assert ratios, "too few steps to compare"
    return statistics.median(ratios)


def held(engine: Engine) -> int:
    """Bytes on the device, without the logits of graphs: more of them are captured as they are needed."""
    gc.collect()
    assert isinstance(engine._runner, DeviceRunner)
    kept = [logits.untyped_storage().nbytes() for _, logits in engine._runner._graphs.values() if logits is not None]
    return torch.cuda.memory_allocated() - sum(-(-nbytes // 512) * 512 for nbytes in kept)  # 512 are the smallest piece


def run(model: PreTrainedModel, seconds: float, config: EngineConfig, exact: bool) -> str:
    """Serve with what is asserted above, and a summary; tokens and times are compared only if `exact`."""
    plain, watch = copy.deepcopy(model), Watch()
    engine = Engine(config, model=model, plugins=[watch])
    with closing(engine):
        soak, began = Soak(engine), time.monotonic()
        soak.serve(began + min(10.0, seconds / 2))
        soak.idle()
        first = held(engine)
        soak.serve(began + seconds)
        soak.idle()
        assert held(engine) == first, "memory leaks"
        stats, took = engine.stats(), time.monotonic() - began
        assert stats.cached_tokens > 0
        summary = (
            f"soak of {took:.0f} s: {soak.num_ended} requests ({dict(soak.reasons)}), {stats.computed_tokens} tokens "
            f"computed, {stats.cached_tokens} cached, {stats.output_tokens} made, {stats.output_tokens / took:.0f} "
            f"tok/s, {stats.preemptions} preemptions ({stats.swapped} swapped)"
        )
        if exact:
            checked, ties = check_alone(soak, plain, seconds / 5)
            slower = slowdown(watch.steps)
            summary += f", {checked} checked ({ties} near-ties), last decodes took {slower:.2f} times as long"
            assert stats.preemptions > 0, summary
            assert checked >= 5, summary
            assert ties <= max(1, checked // 20), summary
            assert slower <= 1.3, summary
            soak.idle()
    return summary


@pytest.mark.timeout(2 * SECONDS + 200)
def test_a_busy_engine_stays_right_and_fast_and_leaks_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model = build("llama", max_position_embeddings=LONGEST_PROMPT + LONGEST_OUTPUT).cuda()
    summary = run(model, SECONDS, EngineConfig(**CONFIG), exact=True)
    with capsys.disabled():
        print(f"\n{summary}")


@pytest.mark.timeout(2 * SECONDS + 200)
def test_a_busy_engine_in_bfloat16(capsys: pytest.CaptureFixture[str]) -> None:
    model = build("llama", **MIDDLE, max_position_embeddings=LONGEST_PROMPT + LONGEST_OUTPUT)
    summary = run(model.to("cuda", torch.bfloat16), SECONDS / 4, EngineConfig(**CONFIG), exact=False)
    with capsys.disabled():
        print(f"\n{summary}")
