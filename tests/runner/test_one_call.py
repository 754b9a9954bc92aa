"""All layers in one call give every bit that they give one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from paged_kernels.cpu import library, linear
from paged_kernels.cpu.decoder import Decoder
from paged_kernels.cpu.structures import Seconds

from paged_backend import Engine, EngineConfig, SamplingParams
from tests.tiny import build

pytestmark = pytest.mark.skipif(library.load() is None, reason="the CPU kernels are not built")
Kind = Literal["bfloat16", "int8 and bfloat16", "int8 and float32"]
KINDS: list[Kind] = ["bfloat16", "int8 and bfloat16", "int8 and float32"]
SCALED = {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 32}),
    ("gemma2", {"final_logit_softcapping": 3.0}),
    ("gemma3_text", {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 3, "sliding_window_pattern": 3}),
    ("phi3", {"partial_rotary_factor": 0.5}),
    ("granite", SCALED | {"attention_multiplier": 0.1}),
    ("glm4", {"head_dim": 16}),
    ("smollm3", {"num_hidden_layers": 4}),
]
PROMPTS = [[(7 * i + row) % 120 + 3 for i in range(length)] for row, length in enumerate((40, 3, 17, 1, 90))]
# Some steps decode, some sample nothing, and of prompts whose log-probabilities are wanted all tokens are looked at.
WANTED = [
    SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, prompt_logprobs=0 if row % 2 else None)
    for row in range(len(PROMPTS))
]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(engine: Engine) -> list[Any]:
    outputs = engine.generate(PROMPTS, WANTED)
    engine.close()
    assert all(output.error is None for output in outputs)
    return [(output.token_ids, output.logprobs, output.prompt_logprobs) for output in outputs]


def make(family: str, overrides: dict[str, Any], kind: Kind, **fields: Any) -> Engine:
    model = build(family, **overrides).to("cpu", torch.float32 if kind.endswith("float32") else torch.bfloat16)
    quantization = "int8" if kind.startswith("int8") else None
    config = {"num_blocks": 64, "max_num_batched_tokens": 64, "max_num_seqs": 8, "quantization": quantization} | fields
    return Engine(EngineConfig(**config), model=model)


def decoder_of(engine: Engine) -> Decoder | None:
    fused = engine._paged_model.fused
    assert fused is not None
    return fused.decoder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
def test_in_one_call_or_many(family: str, overrides: dict[str, Any], kind: Kind) -> None:
    if kind == "bfloat16" and not linear.is_fastest():
        pytest.skip("this CPU's bfloat16 linear layers are oneDNN's")
    many = make(family, overrides, kind, one_call=False)
    assert decoder_of(many) is None
    want = run(many)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        engine = make(family, overrides, kind)
        decoder = decoder_of(engine)
        assert decoder is not None
        assert decoder.can_compute()
        decoder.seconds = Seconds()
        assert run(engine) == want
        spent = decoder.seconds
        assert min(spent.linears, spent.attention, spent.norms, spent.activation) > 0


@pytest.mark.parametrize(
    ("family", "overrides", "kind"),
    [
        ("mixtral", {}, "int8 and float32"),
        ("llama", {"hidden_act": "gelu"}, "int8 and float32"),
    ],
)
def test_what_the_kernels_lack_is_computed_layer_by_layer(family: str, overrides: dict[str, Any], kind: Kind) -> None:
    engine = make(family, overrides, kind)
    decoder = decoder_of(engine)
    assert decoder is not None
    assert not decoder.can_compute()
    assert run(engine) == run(make(family, overrides, kind, one_call=False))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_change_count(kind: Kind) -> None:
    engines = [make("qwen3", {"head_dim": 32}, kind, one_call=one_call) for one_call in (True, False)]
    before = [engine.generate(PROMPTS, WANTED)[0].token_ids for engine in engines]
    for engine in engines:
        with torch.no_grad():
            for parameter in engine.model.parameters():
                parameter.mul_(-1.3)
    after = [run(engine) for engine in engines]
    assert before[0] == before[1]
    assert after[0] == after[1]
    assert before[0] != after[0][0][0]
