"""A transformers decoder as fused kernels over its own weights, recognised by structure.

No list of models: attribute names and shapes say where the projections and norms of a layer are. What they compute
(the weight or 1 + weight, which rotary embedding, which activation) is asked of the model's own modules and of one
forward of it, whose queries, keys, values and logits the fused layers must reproduce.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from paged_kernels.attention import LayerCache, LayerSpec
from paged_kernels.cpu import layers as cpu_layers
from paged_kernels.cpu.decoder import Decoder
from paged_kernels.layer import GLU, Activation, FusedLayer, Linear
from paged_kernels.rope import Rope, rope_and_write_reference
from torch import Tensor, nn

from paged_backend.runner.attention import Layer, handling
from paged_backend.runner.rotated_attention import RotatedAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Norms of a decoder layer: before attention, after it (of what it adds), before the MLP, after it.
_NORMS: tuple[tuple[str, str | None, str, str | None], ...] = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
)
_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}
_CHUNK = 1 << 14  # positions whose cosines are computed at once
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 0.03}


class NotFusable(Exception):
    """The model is none that the fused layers can compute; run its own forward."""


class Attend(Protocol):
    """Attention of one forward."""

    def __call__(self, index: int, layer: FusedLayer, qkv: Tensor) -> Tensor:
        """Write K and V of the layer into the cache and return what the queries see, `[tokens, heads * dim]`.

        `qkv` is `[tokens, (heads + 2 * kv_heads) * dim]`, before norms of heads and rotary embedding. For the last
        layer of a forward with `rows`, return those rows only.
        """
        ...


class FusedModel:
    """The logits of a transformers model from fused kernels.

    Packs projections that read the same input; the model's parameters become views of the packed tensors, so the
    model stays whole and its memory the same, and may be trained; call `refresh` afterwards. Parameters that are
    replaced or moved are not seen.
    Everything in a forward can be captured in a CUDA graph, apart from MLPs that are called as modules.
    """

    def __init__(self, model: PreTrainedModel, layers: list[Layer], max_positions: int, kernels: ModuleType) -> None:
        """Rebuild a model whose attention is attached and probed as `layers`.

        `kernels` is `paged_kernels.gpu.layers` or its counterpart for CPUs. Positions are below `max_positions`. Raises
        `NotFusable`, before or after packing: the model works either way.
        """
        self._kernels, self.linears = kernels, kernels.Linears(model.device)
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        blocks = getattr(decoder, "layers", [])[: len(layers)]
        if [getattr(block, "self_attn", None) for block in blocks] != [layer.module for layer in layers]:
            raise NotFusable("it has no decoder layers with one `self_attn` each")
        if not all(isinstance(getattr(decoder, name, None), nn.Module) for name in ("embed_tokens", "norm")):
            raise NotFusable("its decoder has no `embed_tokens` and `norm`")
        if model.dtype not in _TOLERANCE:
            raise NotFusable(f"it computes in {model.dtype}")
        config = model.config.get_text_config()
        # What layers add is scaled by m (Granite). The stream divided by m gives the same norms, with eps / m^2.
        multiplier = getattr(config, "residual_multiplier", 1.0)
        self._embed = decoder.embed_tokens
        self._embed_scale = getattr(config, "embedding_multiplier", 1.0) / multiplier
        self._copies: list[tuple[Tensor, Tensor]] = []
        """Of 1 + a weight, and the weight."""
        self._norm, eps = _rms_norm(decoder.norm, self._copies)
        self._eps = eps / multiplier**2
        self._head = _pack([_plain(head, model.dtype)])
        self._logits_divisor = getattr(config, "logits_scaling", 1.0)
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.layers = [
            _fuse(block, layer.spec, model.dtype, eps, self._copies)
            for block, layer in zip(blocks, layers, strict=True)
        ]
        self._parameters = list(model.parameters())
        self._version = sum(parameter._version for parameter in self._parameters)
        self._observe(model, blocks, multiplier, max_positions)
        self.decoder: Decoder | None = None
        """What computes all layers of a step on a CPU in one call, wherever it can; None if nothing shall."""
        if kernels is cpu_layers:
            self.decoder = Decoder(self.layers, self._norm, self._head, self._eps, self.linears)
        if model.device.type == "cuda":
            self.linears.own = True  # not before: they would be compiled one by one
            torch.cuda.empty_cache()  # of the parameters before packing

    def refresh(self) -> None:
        """Take over weights that have changed where copies of them are kept: norms that multiply with 1 + weight, and
        what linear layers have packed.
        """
        for copy, weight in self._copies:
            copy.copy_(weight).add_(1)
        version = sum(parameter._version for parameter in self._parameters)
        if version != self._version:
            self._version = version
            self.linears.forget()

    @property
    def has_static_shapes(self) -> bool:
        """Whether a forward can be captured in a CUDA graph."""
        return all(isinstance(layer.mlp, GLU) for layer in self.layers)

    def __call__(self, input_ids: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """Logits `[tokens, vocab]` of `input_ids` `[tokens]`, or `[len(rows), vocab]` of int64 `rows` of them.

        Of the last layer, only K and V are computed for other tokens than `rows`. Call it without autograd.
        """
        residual = self._embed(input_ids)
        if self._embed_scale != 1.0:
            residual = residual * self._embed_scale
        if self.decoder is not None and isinstance(attend, RotatedAttention) and self.decoder.can_compute():
            step = attend.caches, attend.group_of, attend.batches, attend.sampled_at
            return self._finish(self.decoder(residual, *step))
        return self._decode(residual, attend, rows)

    def _decode(self, residual: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """Logits of embeddings `[tokens, hidden]`. As layers are called, these become the residual stream, in place."""
        kernels, one = self._kernels, self.linears.own and len(residual) == 1
        update: Tensor | None = None  # to be added to the residual stream
        update_norm: Tensor | None = None
        for index, layer in enumerate(self.layers):
            if one and update is None:
                qkv = kernels.norm_linear(residual, *layer.qkv, layer.input_norm, self._eps)
            else:
                normed = kernels.add_norm(update, residual, layer.input_norm, self._eps, update_norm)
                qkv = self._linear(normed, layer.qkv)
            attended = attend(index, layer, qkv)
            if rows is not None and index == len(self.layers) - 1:
                residual = residual[rows]
                if not len(rows):
                    return residual.new_empty(0, len(self._head.weight))
            if one and layer.plain:
                assert isinstance(layer.mlp, GLU)
                residual = kernels.linear_add(attended, *layer.out, residual)
                gate_up = layer.mlp.gate_up.weight
                hidden = kernels.norm_gate_up(residual, gate_up, layer.mlp_norm, self._eps, layer.mlp.activation)
                residual = kernels.linear_add(hidden, *layer.mlp.down, residual)
                update = update_norm = None
            else:
                added = self._linear(attended, layer.out)
                normed = kernels.add_norm(added, residual, layer.mlp_norm, self._eps, layer.attention_norm)
                update, update_norm = self._feed_forward(layer.mlp, normed), layer.mlp_out_norm
        logits: Tensor
        if one and update is None:
            logits = kernels.norm_linear(residual, *self._head, self._norm, self._eps)
        else:
            normed = kernels.add_norm(update, residual, self._norm, self._eps, update_norm)
            logits = self._linear(normed, self._head)
        return self._finish(logits)

    def _finish(self, logits: Tensor) -> Tensor:
        """What comes after the head, in place if it can be."""
        if self._logits_divisor != 1.0:
            logits /= self._logits_divisor
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def _linear(self, x: Tensor, linear: Linear) -> Tensor:
        out: Tensor = self.linears(x, *linear)
        return out

    def _feed_forward(self, mlp: GLU | nn.Module, x: Tensor) -> Tensor:
        if isinstance(mlp, GLU):
            hidden = self.linears.gate_up(x, *mlp.gate_up, mlp.activation)
            return self._linear(hidden, mlp.down)
        out = mlp(x.unsqueeze(0))
        # Some experts return their router's scores too.
        added: Tensor = (out[0] if isinstance(out, tuple) else out).squeeze(0)
        return added

    def _observe(self, model: PreTrainedModel, blocks: Sequence[nn.Module], scale: float, max_positions: int) -> None:
        """Compare with a forward of the model, in which every token sees only itself; find each layer's rope.

        Each layer goes on from the model's own residual stream, `scale` times ours, so that rounding does not add up.
        """
        device, tolerance = model.device, _TOLERANCE[model.dtype]
        ids = torch.arange(3, 11, device=device) * 7 % len(self._head.weight)
        positions = torch.linspace(0, max_positions - 1, len(ids), device=device).long()
        own = _Observed()
        with contextlib.ExitStack() as hooks, handling(own), torch.inference_mode():
            for block in blocks:
                hook = block.register_forward_pre_hook(lambda _, args: own.stream.append(args[0].squeeze(0) / scale))
                hooks.callback(hook.remove)
            logits = model(
                input_ids=ids.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                attention_mask=torch.empty(1, 1, 1, 1, device=device),
                use_cache=False,
            ).logits[0]
        ropes: list[Rope | None] = [None]
        for table in _rope_tables(model.get_decoder(), max_positions, device):
            ropes += [Rope(table, interleaved=False), Rope(table, interleaved=True)]

        def check(name: str, difference: float) -> None:
            if not difference <= tolerance:
                raise NotFusable(f"its {name} differ by {difference:.2g}")

        def attend(index: int, layer: FusedLayer, qkv: Tensor) -> Tensor:
            check(f"residuals before layer {index}", _typical(residual, own.stream[index]))
            residual.copy_(own.stream[index])
            query, key, value, layer.sinks = own.calls[index]
            wanted = torch.cat([query, key, value], dim=1)
            differences = [_worst(_rotated(layer, rope, qkv, positions), wanted) for rope in ropes]
            check(f"queries, keys and values of layer {index}", min(differences))
            layer.rope = ropes[differences.index(min(differences))]
            return _own_values(query, value).flatten(1)

        with torch.inference_mode():
            residual = self._embed(ids) * self._embed_scale
            check("logits", _typical(self._decode(residual, attend), logits))


@dataclass
class _Observed:
    """What the layers of a forward got and gave to attention."""

    stream: list[Tensor] = field(default_factory=list)
    """`[tokens, hidden]`, before each layer."""
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    """Queries, keys and values `[tokens, heads, dim]`, and sinks."""

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        self.calls.append((query, key, value, options.get("s_aux")))
        return _own_values(query, value).unsqueeze(0)

    def mask(self, options: dict[str, Any]) -> Tensor | None:
        return None


def _own_values(query: Tensor, value: Tensor) -> Tensor:
    """What attention gives when a token sees only itself."""
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


def _rotated(layer: FusedLayer, rope: Rope | None, qkv: Tensor, positions: Tensor) -> Tensor:
    """Queries, keys and values `[tokens, heads, dim]` as attention would get them with `rope`."""
    spec, qkv = layer.spec, qkv.clone()
    heads = spec.num_heads, spec.num_kv_heads
    scratch = LayerCache(*qkv.new_empty(2, 1, spec.num_kv_heads, len(qkv), spec.key_dim))
    slots = torch.arange(len(qkv), device=qkv.device)
    rope_and_write_reference(qkv, positions, slots, rope, layer.q_norm, layer.k_norm, layer.norm_eps, scratch, *heads)
    return qkv.view(len(qkv), -1, spec.key_dim)


def _differences(got: Tensor, want: Tensor) -> Tensor:
    """Of each token, relative to `want`."""
    got, want = got.flatten(1).float(), want.flatten(1).float()
    differences: Tensor = (got - want).norm(dim=1) / want.norm(dim=1)
    return differences


def _worst(got: Tensor, want: Tensor) -> float:
    return float(_differences(got, want).max())


def _typical(got: Tensor, want: Tensor) -> float:
    """Of the median token: one whose experts are a close choice may get others."""
    return float(_differences(got, want).median())


def _fuse(
    block: Any, spec: LayerSpec, dtype: torch.dtype, eps: float, copies: list[tuple[Tensor, Tensor]]
) -> FusedLayer:
    for module in block.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # Those that a forward with `output_hidden_states` leaves behind do nothing in others.
        harmless = all(getattr(hook, "__module__", None) == "transformers.utils.output_capturing" for hook in hooks)
        if not harmless or "forward" in vars(module):
            raise NotFusable(f"{type(module).__name__} has forward hooks")
    parts = {name for name, child in block.named_children() if not isinstance(child, (nn.Dropout, nn.Identity))}
    names = next((names for names in _NORMS if {"self_attn", "mlp", *names} - {None} == parts), None)
    if names is None:
        raise NotFusable(f"its decoder layer has parts {sorted(parts)}")
    attention = block.self_attn
    parts = {name for name, child in attention.named_children() if any(True for _ in child.parameters())}
    projections = ["qkv_proj"] if "qkv_proj" in parts else ["q_proj", "k_proj", "v_proj"]
    head_norms = parts - {*projections, "o_proj"}
    if head_norms not in (set(), {"q_norm", "k_norm"}) or not parts >= {*projections, "o_proj"}:
        raise NotFusable(f"its attention has parts {sorted(parts)}")
    qkv = [_plain(getattr(attention, name), dtype) for name in projections]
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.key_dim
    if spec.key_dim != spec.value_dim or width != sum(linear.out_features for linear in qkv):
        raise NotFusable("its projections are not those of the heads alone")

    def norm(name: str) -> Tensor:
        return _norm_weight(getattr(block, name), eps, copies)

    before_attention, after_attention, before_mlp, after_mlp = names
    return FusedLayer(
        spec=spec,
        qkv=_pack(qkv),
        out=_pack([_plain(attention.o_proj, dtype)]),
        mlp=_glu(block.mlp, dtype) or block.mlp,
        input_norm=norm(before_attention),
        attention_norm=None if after_attention is None else norm(after_attention),
        mlp_norm=norm(before_mlp),
        mlp_out_norm=None if after_mlp is None else norm(after_mlp),
        q_norm=_norm_weight(attention.q_norm, eps, copies, spec.key_dim) if head_norms else None,
        k_norm=_norm_weight(attention.k_norm, eps, copies, spec.key_dim) if head_norms else None,
        norm_eps=eps,
    )


def _glu(mlp: nn.Module, dtype: torch.dtype) -> GLU | None:
    """The gated MLP that a module is, if it is one."""
    children = dict(mlp.named_children())
    names = ["gate_up_proj"] if "gate_up_proj" in children else ["gate_proj", "up_proj"]
    if {*names, "down_proj"} - children.keys() or len(children) != len(names) + 2:
        return None
    *gate_up, down = (children.pop(name) for name in (*names, "down_proj"))
    x = torch.linspace(-12, 12, 97, dtype=torch.float32)
    own = children.popitem()[1](x)
    activation = next((name for name, function in _ACTIVATIONS.items() if torch.allclose(function(x), own)), None)
    if activation is None:
        return None
    return GLU(_pack([_plain(linear, dtype) for linear in gate_up]), _pack([_plain(down, dtype)]), activation)


def _plain(linear: nn.Module | None, dtype: torch.dtype) -> nn.Linear:
    """`linear`, if it computes `F.linear` of a weight in the model's dtype: not quantised, no adapter."""
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter or linear.weight.dtype != dtype:
        raise NotFusable(f"a projection is a {type(linear).__name__}, not a plain linear of {dtype}")
    return linear


def _pack(linears: Sequence[nn.Linear]) -> Linear:
    """One linear that computes all of them, whose weights and biases become views of its own."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if biases and len(biases) != len(linears):
        raise NotFusable("only some projections of one input have a bias")
    return Linear(_join([linear.weight for linear in linears]), _join(biases) if biases else None)


@torch.inference_mode(False)
def _join(parameters: Sequence[Tensor]) -> Tensor:
    if len(parameters) == 1:
        return parameters[0].data
    packed = torch.cat([parameter.data for parameter in parameters])
    parts = torch.split(packed, [len(parameter) for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return packed


def _norm_weight(norm: nn.Module, eps: float, copies: list[tuple[Tensor, Tensor]], size: int | None = None) -> Tensor:
    weight, own = _rms_norm(norm, copies)
    if own != eps or size not in (None, len(weight)):
        raise NotFusable(f"{type(norm).__name__} has {len(weight)} weights and epsilon {own:g}, others {eps:g}")
    return weight


def _rms_norm(norm: nn.Module, copies: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, float]:
    """What an RMS norm multiplies with, its weight or 1 + weight, and its epsilon: the best of what its output says."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        raise NotFusable(f"{type(norm).__name__} has no weight of one dimension")
    weight, found = weight.data, []
    for eps in {value for value in vars(norm).values() if isinstance(value, float) and value > 0}:
        # So small that epsilon counts; not centred, so that a layer norm differs.
        x = (torch.linspace(-1, 2, len(weight), device=weight.device) * math.sqrt(eps)).to(weight.dtype).unsqueeze(0)
        with torch.inference_mode():
            own = norm(x)
        normed = x.float() * torch.rsqrt(x.float().square().mean() + eps)
        found += [(_worst(normed * by, own), eps, by) for by in (weight, 1 + weight.float())]
    difference, eps, by = min(found, key=lambda item: item[0], default=(math.inf, 0.0, weight))
    if not difference <= _TOLERANCE[weight.dtype]:
        raise NotFusable(f"{type(norm).__name__} is not an RMS norm")
    if by is not weight:
        copies.append((by, weight))
    return by, eps


def _rope_tables(decoder: Any, max_positions: int, device: torch.device) -> list[Tensor]:
    """Cosines, then sines, `[max_positions, rot_dim]` in float32, of each kind of layer the decoder has."""
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        return []
    kinds: list[dict[str, str]] = [{}]
    if "layer_type" in inspect.signature(rotary.forward).parameters:
        kinds = [{"layer_type": name} for name in dict.fromkeys(decoder.config.layer_types)]
    chunks = torch.split(torch.arange(max_positions, device=device), _CHUNK)
    return [torch.cat([_cos_sin(rotary, chunk, **kind) for chunk in chunks]) for kind in kinds]


def _cos_sin(rotary: nn.Module, positions: Tensor, **kind: str) -> Tensor:
    like = torch.empty(1, dtype=torch.float32, device=positions.device)
    tables = rotary(like, positions.unsqueeze(0), **kind)
    cos, sin = (table.squeeze(0) for table in tables)
    half = cos.shape[-1] // 2
    if torch.equal(cos[:, :half], cos[:, half:]):
        cos, sin = cos[:, :half], sin[:, :half]
    elif torch.equal(cos[:, ::2], cos[:, 1::2]):
        cos, sin = cos[:, ::2], sin[:, ::2]
    return torch.cat([cos, sin], dim=-1)
