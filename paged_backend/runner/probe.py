"""Learns a model's attention geometry from the model itself, with one tiny forward instead of a list of models.

The probing attention function records shapes, scale and soft-cap of every call. The probing mask function asks the
model's own mask closure, at positions far apart, what a query sees: everything, a sliding window, or a local chunk.
Whatever else it finds is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from paged_kernels.attention import LayerSpec
from torch import Tensor, nn

from paged_backend.errors import UnsupportedModel
from paged_backend.runner.attention import Layer, handling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FAR = 1 << 20


class _Probe:
    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.layers: list[Layer] = []
        self.spans: list[dict[str, int]] = []

    def mask(self, options: dict[str, Any]) -> Tensor:
        """A 1-element tensor that says which of `spans` the layer's mask has."""
        self.spans.append(_span(options["mask_function"]))
        return torch.full((1, 1, 1, 1), float(len(self.spans) - 1))

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        name = type(module).__name__
        if options.get("position_bias") is not None:
            raise UnsupportedModel(f"{name} adds a position bias to its attention scores")
        if (key.device, key.dtype) != (self.device, self.dtype):
            raise UnsupportedModel(
                f"{name} computes in {key.dtype} on {key.device}, but the model is {self.dtype} on {self.device}; "
                "layers on several devices or of several types are not supported"
            )
        if key.shape[2] != query.shape[2]:
            raise UnsupportedModel(f"{name} attends to {key.shape[2]} keys for {query.shape[2]} new tokens")
        if mask is not None and mask.numel() != 1:
            raise UnsupportedModel(f"{name} builds its own attention mask of shape {tuple(mask.shape)}")
        span = {} if mask is None else self.spans[int(mask.item())]
        window = options.get("sliding_window")
        scale = options.get("scaling")
        self.layers.append(
            Layer(
                module,
                LayerSpec(
                    num_heads=query.shape[1],
                    num_kv_heads=key.shape[1],
                    key_dim=key.shape[3],
                    value_dim=value.shape[3],
                    scale=key.shape[3] ** -0.5 if scale is None else float(scale),
                    window=span.get("window", window),
                    chunk=span.get("chunk"),
                    softcap=options.get("softcap"),
                ),
            )
        )
        return value.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


def probe(model: PreTrainedModel) -> list[Layer]:
    """The attention calls of one forward, in order. Raises `UnsupportedModel`."""
    if model.training:
        raise UnsupportedModel(f"{type(model).__name__} is in training mode; call model.eval() first")
    attend = _Probe(model.device, model.dtype)
    positions = torch.arange(3, device=model.device).unsqueeze(0)
    try:
        with handling(attend), torch.inference_mode():
            model(input_ids=positions + 1, position_ids=positions, use_cache=False)
    except UnsupportedModel:
        raise
    except Exception as error:
        raise UnsupportedModel(f"{type(model).__name__} cannot run a flat batch of tokens: {error!r}") from error
    if not attend.layers:
        raise UnsupportedModel(f"{type(model).__name__} never called the attention interface")
    return attend.layers


def _span(mask_function: Callable[..., Any]) -> dict[str, int]:
    """What a causal mask closure lets a query see: {} everything before it, or its "window" or "chunk" size."""

    def sees(query: int, key: int) -> bool:
        zero = torch.tensor(0)
        return bool(mask_function(zero, zero, torch.tensor(query), torch.tensor(key)))

    def oldest(query: int) -> int:
        return _first(lambda key: sees(query, key), 0, query)

    try:
        if sees(_FAR, _FAR + 1) or not sees(_FAR, _FAR):
            raise UnsupportedModel("its attention mask is not causal")
        at = oldest(_FAR)
        if at == 0:
            return {}
        if oldest(_FAR + 1) == at + 1:
            return {"window": _FAR - at + 1}
        next_chunk = _first(lambda query: oldest(query) > at, _FAR, 2 * _FAR)
        return {"chunk": next_chunk - at}
    except (IndexError, RuntimeError) as error:
        raise UnsupportedModel(f"its attention mask cannot be evaluated at position {_FAR}: {error}") from error


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest integer in low..high for which the monotone `holds` is true; `high` if none below."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
