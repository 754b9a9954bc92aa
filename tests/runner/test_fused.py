"""Fused layers compute the logits of the models that they recognise, and refuse the others."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from paged_kernels.attention import AttentionBatch, LayerCache, ReferenceAttention
from torch import Tensor, nn
from transformers import PreTrainedModel

from paged_backend.runner.attention import attach
from paged_backend.runner.probe import probe
from tests import tiny

pytest.importorskip("triton")
from paged_kernels.cpu import layers as cpu_layers
from paged_kernels.gpu import layers as gpu_layers
from paged_kernels.layer import GLU, FusedLayer
from paged_kernels.rope import rope_and_write_reference

from paged_backend.runner.fused import FusedModel, NotFusable

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LONGEST = 256
HALF_ROTATED = {"partial_rotary_factor": 0.5}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SCALED = {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0}
WINDOW = {"head_dim": 16, "sliding_window": 8}

FUSED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": LLAMA3_ROPE}),
    ("qwen2", {"rope_parameters": YARN_ROPE}),
    ("qwen3", {}),
    ("mistral", {}),
    ("gemma", {"head_dim": 16}),
    ("gemma2", {"final_logit_softcapping": 3.0}),
    ("gemma3_text", WINDOW | {"query_pre_attn_scalar": 16, "num_hidden_layers": 3, "sliding_window_pattern": 3}),
    ("phi3", {}),
    ("phi3", HALF_ROTATED),
    ("mixtral", {}),
    ("qwen3_moe", EXPERTS | {"head_dim": 16, "mlp_only_layers": [0]}),
    ("gpt_oss", WINDOW | LOCAL_EXPERTS),
    ("granite", SCALED | {"attention_multiplier": 0.1}),
    ("glm", {"head_dim": 16}),
    ("glm4", {"head_dim": 16}),
    ("smollm3", {"num_hidden_layers": 4}),
]
ONE = ("llama", "qwen2", "gemma", "gemma2", "qwen3_moe", "granite")
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {}, "no decoder layers"),
    ("gpt_neox", {}, "no decoder layers"),
    ("opt", {}, "no `embed_tokens`"),
    ("olmo2", {}, "decoder layer has parts"),
    ("cohere", {}, "CohereLayerNorm is not an RMS norm"),
    ("starcoder2", {}, "LayerNorm is not an RMS norm"),
]


def build(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    return tiny.build(family, **overrides).to(DEVICE)


def fuse(model: PreTrainedModel, kernels: ModuleType = gpu_layers) -> FusedModel:
    attach(model)
    return FusedModel(model, probe(model), LONGEST, kernels)


class Causal:
    """Reference attention of one sequence, from its beginning; of the `last` layer only `rows`."""

    def __init__(self, tokens: int, last: int = -1, rows: Tensor | None = None) -> None:
        self.positions, self.last, self.rows = torch.arange(tokens, device=DEVICE), last, rows

    def __call__(self, index: int, layer: FusedLayer, qkv: Tensor) -> Tensor:
        spec, tokens = layer.spec, len(qkv)
        heads = spec.num_heads, spec.num_kv_heads
        cache = LayerCache(*torch.full((2, 2, spec.num_kv_heads, tokens, spec.key_dim), float("nan"), device=DEVICE))
        batch = AttentionBatch(self.positions + tokens, torch.tensor([[1]], device=DEVICE), [0], [tokens], 0)
        norms = layer.q_norm, layer.k_norm, layer.norm_eps
        rope_and_write_reference(qkv, self.positions, batch.slot_mapping, layer.rope, *norms, cache, *heads)
        query = qkv.view(tokens, -1, spec.key_dim)[:, : spec.num_heads]
        key, value = (stored[1].transpose(0, 1) for stored in cache)
        reference = ReferenceAttention()
        scratch = reference.allocate(spec, 1, tokens, qkv.dtype, qkv.device)
        out = reference.forward(spec, scratch, query, key, value, layer.sinks, batch).flatten(1)
        return out[self.rows] if index == self.last and self.rows is not None else out


@torch.inference_mode()
def check(model: PreTrainedModel, kernels: ModuleType = gpu_layers) -> None:
    """Fuse a model; its logits and those of some rows must be as before, its own as well."""
    ids = torch.randint(3, 128, (33,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    before = model(ids[None]).logits[0]
    fused = fuse(model, kernels)
    assert torch.equal(model(ids[None]).logits[0], before)
    allowed = 2e-4 * float(before.abs().max())
    torch.testing.assert_close(fused(ids, Causal(len(ids))), before, rtol=0, atol=allowed)
    rows = torch.tensor([11, 4, len(ids) - 1], device=DEVICE)
    some = fused(ids.int(), Causal(len(ids), len(fused.layers) - 1, rows), rows)
    torch.testing.assert_close(some, before[rows], rtol=0, atol=allowed)


@pytest.mark.parametrize("kernels", [gpu_layers] if DEVICE == "cuda" else [gpu_layers, cpu_layers])
@pytest.mark.parametrize(("family", "overrides"), FUSED)
def test_fused_logits_are_the_models_own(family: str, overrides: dict[str, Any], kernels: ModuleType) -> None:
    check(build(family, **overrides), kernels)


@pytest.mark.parametrize(("family", "overrides"), [case for case in FUSED if case[0] in ONE])
def test_other_kernels_give_the_same_logits_of_one_token_and_of_few(family: str, overrides: dict[str, Any]) -> None:
    model = build(family, **overrides)
    ids = torch.arange(16, device=DEVICE) + 3
    with torch.inference_mode():
        before = model(ids[None]).logits[0]
        fused = fuse(model)
        fused.linears.own = True
        for tokens in (1, 16):
            logits = fused(ids[:tokens], Causal(tokens))
            torch.testing.assert_close(logits, before[:tokens], rtol=0, atol=2e-4 * float(before.abs().max()))


@pytest.mark.parametrize(("family", "overrides", "reason"), REFUSED)
def test_models_of_another_structure_are_refused(family: str, overrides: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotFusable, match=reason):
        fuse(build(family, **overrides))


def test_what_layers_are_is_found_by_asking() -> None:
    gemma3 = fuse(build("gemma3_text", **dict(FUSED)["gemma3_text"]))
    tables = [layer.rope.cos_sin for layer in gemma3.layers if layer.rope is not None]
    assert tables[0] is tables[1]
    assert tables[0] is not tables[2], "the global layer has its own frequencies"
    assert gemma3.layers[0].input_norm.dtype == torch.float32
    glm = fuse(build("glm", head_dim=16)).layers[0]
    assert glm.rope is not None
    assert glm.rope.interleaved
    assert glm.rope.cos_sin.shape == (LONGEST, 8), "half of each head is rotated"
    smollm3 = fuse(build("smollm3", num_hidden_layers=4))
    assert [layer.rope is None for layer in smollm3.layers] == [False, False, False, True]
    gpt_oss = build("gpt_oss", **WINDOW, **LOCAL_EXPERTS)
    layer = fuse(gpt_oss).layers[0]
    assert layer.sinks is gpt_oss.model.layers[0].self_attn.sinks
    assert layer.mlp is gpt_oss.model.layers[0].mlp


def test_parameters_are_views_of_the_packed_weights() -> None:
    model = build("llama", attention_bias=True, tie_word_embeddings=True)
    layer = fuse(model).layers[1]
    assert isinstance(layer.mlp, GLU)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    for packed, linears in (
        (layer.qkv, (attention.q_proj, attention.k_proj, attention.v_proj)),
        (layer.out, (attention.o_proj,)),
        (layer.mlp.gate_up, (mlp.gate_proj, mlp.up_proj)),
        (layer.mlp.down, (mlp.down_proj,)),
    ):
        at = packed.weight.data_ptr()
        for linear in linears:
            assert linear.weight.data_ptr() == at
            at += linear.weight.nbytes
            assert linear.weight.requires_grad
        assert at == packed.weight.data_ptr() + packed.weight.untyped_storage().nbytes()
    assert attention.q_proj.bias.data_ptr() == layer.qkv.bias.data_ptr()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.tensor([[3, 4, 5]], device=DEVICE)
    model(ids, labels=ids).loss.backward()
    assert attention.k_proj.weight.grad.abs().sum() > 0, "it can still be trained"


def test_collected_hidden_states_leave_a_model_fusable() -> None:
    model = build()
    model(torch.tensor([[3, 4]], device=DEVICE), output_hidden_states=True)
    fuse(model)


class Adapter(nn.Linear):
    pass


def add_hook(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, output: output + 1)


def patch_forward(model: PreTrainedModel) -> None:
    attention = model.model.layers[1].self_attn
    attention.forward = attention.forward


def add_adapter(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.v_proj = Adapter(64, 32, bias=False, device=DEVICE)


def add_one_bias(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.v_proj.bias = nn.Parameter(torch.ones(32, device=DEVICE))


def change_epsilon(model: PreTrainedModel) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 1e-3


def double_a_layer(model: PreTrainedModel) -> None:
    layer = model.model.layers[0]
    doubled = type("Doubled", (type(layer),), {})
    doubled.forward = lambda self, x, **options: 2 * super(doubled, self).forward(x, **options)
    layer.__class__ = doubled


def claim_a_softcap(model: PreTrainedModel) -> None:
    model.config.final_logit_softcapping = 1.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add_hook, "has forward hooks"),
        (patch_forward, "has forward hooks"),
        (add_adapter, "is a Adapter"),
        (add_one_bias, "only some projections"),
        (change_epsilon, "epsilon 0.001, others 1e-06"),
        (double_a_layer, "residuals before layer 1 differ"),
        (claim_a_softcap, "its logits differ"),
    ],
)
def test_changed_models_are_refused_and_still_work(change: Callable[[PreTrainedModel], None], reason: str) -> None:
    model = build()
    change(model)
    ids = torch.arange(3, 20, device=DEVICE)[None]
    before = model(ids).logits
    with pytest.raises(NotFusable, match=reason):
        fuse(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)


def test_a_factor_that_sets_in_at_far_positions_is_noticed() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 2.0}
    rope["original_max_position_embeddings"] = LONGEST - LONGEST // 4
    with pytest.raises(NotFusable, match="queries, keys and values"):
        fuse(build("ministral3", head_dim=16, rope_parameters=rope, sliding_window=None))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_weights_that_are_trained_afterwards_count(family: str) -> None:
    model = build(family)
    fused = fuse(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
        fused.refresh()
        ids = torch.arange(3, 12, device=DEVICE)
        want = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]
        torch.testing.assert_close(fused(ids, Causal(len(ids))), want, atol=2e-4, rtol=2e-4)
