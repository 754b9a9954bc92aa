"""What the probe learns of a model, and which models it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from paged_backend import Engine, EngineConfig, UnsupportedModel
from paged_backend.runner.attention import attach, detach
from paged_backend.runner.loader import context_length
from paged_backend.runner.probe import probe
from tests.tiny import FAMILIES, SHAPE, build


def specs(model: PreTrainedModel) -> list[Any]:
    attach(model)
    try:
        return [layer.spec for layer in probe(model)]
    finally:
        detach(model)


def test_llama_has_full_attention_with_grouped_heads() -> None:
    for spec in specs(build("llama")):
        assert (spec.num_heads, spec.num_kv_heads, spec.key_dim, spec.value_dim) == (4, 2, 16, 16)
        assert spec.scale == 16**-0.5
        assert (spec.window, spec.chunk, spec.softcap) == (None, None, None)


def test_gemma2_alternates_windows_and_caps_its_logits() -> None:
    found = specs(build("gemma2"))
    assert [spec.window for spec in found] == [8, None]
    assert {spec.softcap for spec in found} == {2.0}


def test_mistral_has_a_window_in_every_layer() -> None:
    assert [spec.window for spec in specs(build("mistral"))] == [8, 8]


def test_llama4_has_chunks_that_only_its_mask_knows_of() -> None:
    config = AutoConfig.for_model(
        "llama4_text", **SHAPE, head_dim=16, attention_chunk_size=16, num_local_experts=2, intermediate_size_mlp=96
    )
    config.layer_types = ["chunked_attention", "full_attention"]
    model = AutoModelForCausalLM.from_config(config).float().eval()
    assert [spec.chunk for spec in specs(model)] == [16, None]


@pytest.mark.parametrize("family", FAMILIES)
def test_closing_the_engine_leaves_the_model_as_it_was(family: str) -> None:
    model = build(family)
    ids = torch.randint(3, 128, (2, 20))
    implementation = model.config._attn_implementation
    with torch.inference_mode():
        before = model(ids).logits
        engine = Engine(EngineConfig(num_blocks=8), model=model)
        during = model(ids).logits
        engine.close()
        after = model(ids).logits
    assert torch.equal(before, during), "an ordinary forward beside the engine is the model's own"
    assert torch.equal(before, after)
    assert model.config._attn_implementation == implementation


REFUSED = {
    "bloom": ({"n_head": 4, "hidden_size": 64}, "AttentionInterface"),
    "mamba": ({}, "never called the attention interface"),
    "qwen3_next": (
        {
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "computes other logits over a paged cache",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_be_paged_are_refused_and_left_alone(family: str) -> None:
    overrides, reason = REFUSED[family]
    config = AutoConfig.for_model(family, **{**SHAPE, **overrides})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    implementation = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match=reason):
        Engine(EngineConfig(num_blocks=8), model=model)
    assert model.config._attn_implementation == implementation


def test_rotary_embeddings_that_switch_with_length_limit_the_context() -> None:
    dynamic = build("llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    assert context_length(dynamic) == 256
    short, long = [1.0] * 8, [4.0] * 8
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": 64,
    }
    assert context_length(build("phi3", rope_parameters=rope, original_max_position_embeddings=64)) == 64
