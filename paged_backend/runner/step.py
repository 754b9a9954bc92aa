"""One step as the fused model and its kernels see it: device tensors only, so that a CUDA graph can replay it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paged_kernels.attention import LayerCache, LayerSpec
from torch import Tensor

if TYPE_CHECKING:
    from paged_kernels.gpu.decode_attention import DecodeRows, Work
    from paged_kernels.gpu.prefill_attention import PrefillRows
    from paged_kernels.gpu.shared_prefix import SharedPrefixes
    from paged_kernels.layer import FusedLayer


@dataclass(slots=True)
class StepInputs:
    """Rows of one token come first in the flat batch of tokens."""

    input_ids: Tensor
    """`[tokens]` int32."""
    positions: Tensor
    """`[tokens]` int32."""
    slot_mapping: Tensor
    """`[groups, tokens]` int64."""
    tables: Tensor
    """`[groups, slots, max_blocks]` int32."""
    decodes: DecodeRows | None
    """The rows of one token, the first of the batch."""
    chunks: PrefillRows | None
    """The other rows, but for `prompts`."""
    sampled: DecodeRows | None = None
    """The tokens that sample, as rows of one token; None if these are exactly `decodes`, and there are no others."""
    sampled_at: Tensor | None = None
    """`[len(sampled)]` int64: where in the batch they are."""
    prompts: Sequence[tuple[int, int, int]] = ()
    """Offset, number and tokens each of rows, end to end, that `attend_to_whole_prompts` shall do."""
    shared: SharedPrefixes | None = None
    """Of `decodes`, if these are all there is, in models without windows."""


@dataclass(slots=True)
class PagedAttention:
    """The attention of one step's layers; see `fused.Attend`."""

    inputs: StepInputs
    caches: Sequence[LayerCache]
    group_of: Sequence[int]
    """Of each layer."""
    _works: dict[tuple[object, ...], Work] = field(default_factory=dict)

    def plan(self, specs: Sequence[LayerSpec]) -> None:
        """Cut up the work of all layers, ahead of them: attention reads it while the kernel before it still runs."""
        from paged_kernels.gpu.decode_attention import plan_work

        inputs = self.inputs
        wanted = [(inputs.decodes, spec) for spec in specs] + [(inputs.sampled, specs[-1])]
        for rows, spec in wanted:
            if rows is not None and len(rows.slots) and (key := _work_key(rows, spec)) not in self._works:
                self._works[key] = plan_work(rows, spec, None if inputs.shared is None else inputs.shared.rows)

    def __call__(self, index: int, layer: FusedLayer, qkv: Tensor) -> Tensor:
        """Rope, write K and V, attend; in the last layer only for the tokens that sample."""
        from paged_kernels.gpu.prefill_attention import prefill_attention
        from paged_kernels.gpu.rope import rope_and_write

        inputs, spec, group, cache = self.inputs, layer.spec, self.group_of[index], self.caches[index]
        rope_and_write(
            qkv,
            inputs.positions,
            inputs.slot_mapping[group],
            layer.rope,
            layer.q_norm,
            layer.k_norm,
            layer.norm_eps,
            cache,
            spec.num_heads,
            spec.num_kv_heads,
        )
        tables = inputs.tables[group]
        if inputs.sampled is not None and inputs.sampled_at is not None and index == len(self.caches) - 1:
            out = qkv.new_empty(len(inputs.sampled_at), spec.num_heads * spec.value_dim)
            if len(out):
                self._decode(qkv[inputs.sampled_at], cache, tables, inputs.sampled, layer, out)
            return out
        out = qkv.new_empty(qkv.shape[0], spec.num_heads * spec.value_dim)
        if inputs.decodes is not None:
            self._decode(qkv, cache, tables, inputs.decodes, layer, out)
        if inputs.chunks is not None:
            prefill_attention(qkv, cache, tables, inputs.chunks, spec, layer.sinks, out)
        if inputs.prompts:
            from paged_kernels.gpu.whole_prompt_attention import attend_to_whole_prompts

            for offset, number, count in inputs.prompts:
                tokens = slice(offset, offset + number * count)
                attend_to_whole_prompts(qkv[tokens], number, spec, out[tokens])
        return out

    def _decode(
        self, qkv: Tensor, cache: LayerCache, tables: Tensor, rows: DecodeRows, layer: FusedLayer, out: Tensor
    ) -> None:
        from paged_kernels.gpu.decode_attention import decode_attention
        from paged_kernels.gpu.shared_prefix import attend_to_prefixes

        work, shared = self._works[_work_key(rows, layer.spec)], None
        if self.inputs.shared is not None:
            shared = attend_to_prefixes(qkv, cache, tables, self.inputs.shared, layer.spec)
        decode_attention(qkv, cache, tables, rows, work, layer.spec, layer.sinks, out, shared)


def _work_key(rows: DecodeRows, spec: LayerSpec) -> tuple[object, ...]:
    from paged_kernels.gpu.decode_attention import tile_of

    return id(rows), spec.window, spec.chunk, spec.num_kv_heads, tile_of(spec)
