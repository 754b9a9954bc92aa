"""The engine with int8 weights: near to without, told by whom it cannot be, and off unless asked for."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paged_kernels.attention import ReferenceAttention
from paged_kernels.cpu import int8, library

from paged_backend import Engine, EngineConfig, InvalidArgument, SamplingParams, UnsupportedModel
from paged_backend.runner.setup import make_model
from tests.tiny import build

built = pytest.mark.skipif(library.load() is None, reason="the CPU kernels are not built")
PROMPTS = [[(7 * i + row) % 120 + 3 for i in range(length)] for row, length in enumerate((40, 3, 17))]
SCORED = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0, logprobs=0)


def make(family: str = "llama", dtype: torch.dtype = torch.float32, **fields: Any) -> Engine:
    model = build(family).to("cpu", dtype)
    return Engine(EngineConfig(**{"num_blocks": 64, "quantization": "int8"} | fields), model=model)


def run(engine: Engine, prompts: list[list[int]] = PROMPTS) -> list[tuple[list[int], list[float]]]:
    """Tokens, and log-probabilities of those of the prompt and of these."""
    found = []
    for output in engine.generate(prompts, SCORED):
        assert output.error is None
        assert output.prompt_logprobs is not None
        assert output.logprobs is not None
        scored = [*output.prompt_logprobs[1:], *output.logprobs]
        found.append((output.token_ids, [first.logprob for first, *_ in scored]))
    engine.close()
    return found


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3"])
def test_prompts_score_nearly_as_without(family: str, dtype: torch.dtype) -> None:
    plain, quantised = run(make(family, dtype, quantization=None)), run(make(family, dtype))
    differences = []
    for prompt, (_, without), (_, with_) in zip(PROMPTS, plain, quantised, strict=True):
        scored = len(prompt) - 1
        differences += [abs(a - b) for a, b in zip(without[:scored], with_[:scored], strict=True)]
    assert 0 < sum(differences) / len(differences) < 0.1, "log-probabilities are about -5"


@built
def test_a_request_does_not_depend_on_the_others_nor_on_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    together = run(make(dtype=torch.bfloat16))
    alone = [run(make(dtype=torch.bfloat16), [prompt])[0] for prompt in PROMPTS]
    assert [tokens for tokens, _ in together] == [tokens for tokens, _ in alone]
    monkeypatch.setattr(int8, "best", lambda: "avx2")
    assert run(make(dtype=torch.bfloat16)) == together


@built
def test_weights_that_change_are_quantised_anew() -> None:
    engine = make()
    (before,) = engine.generate(PROMPTS[:1], SCORED)
    with torch.no_grad():
        engine.model.lm_head.weight.neg_()
    (after,) = engine.generate(PROMPTS[:1], SCORED)
    assert before.token_ids != after.token_ids
    changed = build()
    with torch.no_grad():
        changed.lm_head.weight.neg_()
    fresh = Engine(EngineConfig(num_blocks=64, quantization="int8"), model=changed)
    assert fresh.generate(PROMPTS[:1], SCORED)[0].token_ids == after.token_ids


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fuse": False}, "quantization='int8': needs fuse=True"),
        ({"attention_backend": "reference"}, "quantization='int8': needs the compiled CPU kernels"),
        ({"block_size": 5}, "quantization='int8': needs the compiled CPU kernels"),
        ({"quantization": "int3"}, "quantization='int3': Input should be 'int8'"),
    ],
)
def test_fields_that_it_does_not_go_with_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        make(**fields)


def test_it_is_for_cpus() -> None:
    model: Any = SimpleNamespace(device=torch.device("cuda:1"))
    with pytest.raises(InvalidArgument, match="is for CPUs; the model is on cuda:1"):
        make_model(EngineConfig(quantization="int8"), model, ReferenceAttention(), 64)


@built
def test_a_model_that_cannot_be_fused_is_refused_and_left_as_it_was() -> None:
    model = build("gpt2")
    before = model.config._attn_implementation
    with pytest.raises(
        UnsupportedModel, match="GPT2LMHeadModel cannot be quantised, since it cannot be fused: it has no"
    ):
        Engine(EngineConfig(num_blocks=64, quantization="int8"), model=model)
    assert model.config._attn_implementation == before
