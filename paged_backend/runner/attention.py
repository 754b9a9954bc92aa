"""The plug into transformers: a registered attention function that pages the call, not the model.

`AttentionInterface` lets every attention module of a model call our function. Inside a forward of the engine (a
`ForwardContext` is active) it reads and writes the paged cache; in any other forward of the same model, such as
training or an ordinary `generate`, it hands over to the implementation the model had before.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from paged_kernels.attention import AttentionBackend, AttentionBatch, LayerCache, LayerSpec
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from paged_backend.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "paged_backend_"


class Attend(Protocol):
    """What handles the attention calls and mask requests of one forward."""

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Output `[1, tokens, heads, dim]` for tensors `[1, heads, tokens, dim]`."""
        ...

    def mask(self, options: dict[str, Any]) -> Tensor | None:
        """The attention mask for the options of a mask function."""
        ...


# Not kwargs of the forward: some models (nemotron, stablelm) do not pass them down to their attention.
_active: ContextVar[Attend | None] = ContextVar("paged_backend_forward", default=None)


@contextlib.contextmanager
def handling(attend: Attend) -> Iterator[None]:
    """Let `attend` handle the attention of forwards made inside, in this thread."""
    token = _active.set(attend)
    try:
        yield
    finally:
        _active.reset(token)


@dataclass(frozen=True, slots=True)
class Layer:
    """One attention call of a forward, in call order."""

    module: nn.Module
    spec: LayerSpec


@dataclass(slots=True)
class ForwardContext:
    """One forward over the paged cache."""

    backend: AttentionBackend
    layers: list[Layer]
    caches: list[LayerCache]
    batches: list[AttentionBatch]
    """One a layer; layers of a group have the same."""
    _calls: int = field(default=0, init=False)

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        """See `Attend`. Calls come in the order of the probe; a model that changes it cannot be paged."""
        layer, cache, batch = self.layers[self._calls], self.caches[self._calls], self.batches[self._calls]
        if layer.module is not module:
            raise UnsupportedModel(f"{type(module).__name__}: attention layers are not called in a fixed order")
        self._calls += 1
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        return self.backend.forward(layer.spec, cache, query, key, value, options.get("s_aux"), batch).unsqueeze(0)

    def mask(self, options: dict[str, Any]) -> Tensor | None:
        """No mask: the block tables and the layer's spec say what is visible."""
        return None

    def check(self) -> None:
        """Raise unless every attention call came here: else the rows have seen each other."""
        if self._calls != len(self.layers):
            raise UnsupportedModel("the attention implementation of the model was changed while an engine serves it")


def attach(model: PreTrainedModel) -> None:
    """Make the model's attention call us. Raises `UnsupportedModel` when its code does not go through the interface."""
    original = model.config._attn_implementation
    if original.startswith(_PREFIX):
        raise UnsupportedModel(f"this {type(model).__name__} is in use by another engine; close that one first")
    _register(original)
    set_implementation(model, _PREFIX + original)


def detach(model: PreTrainedModel) -> None:
    """Give the model the attention implementation back that it had before `attach`."""
    set_implementation(model, model.config._attn_implementation.removeprefix(_PREFIX))


@contextlib.contextmanager
def using_eager(model: PreTrainedModel) -> Iterator[None]:
    """Compute with the model's own plain attention, the one that has all its features: older sdpa drops soft-caps."""
    before = model.config._attn_implementation
    set_implementation(model, "eager")
    try:
        yield
    finally:
        set_implementation(model, before)


def set_implementation(model: PreTrainedModel, name: str) -> None:
    """Set the attention implementation, and make sure that it took."""
    model.set_attn_implementation(name)
    now = model.config.get_text_config()._attn_implementation
    if now != name:
        raise UnsupportedModel(
            f"{type(model).__name__} ({model.config.model_type}) does not route its attention through transformers' "
            "AttentionInterface, so it cannot use a paged cache; run it with plain generate"
        )


def _register(original: str) -> None:
    """Register our function and mask under a name that remembers which implementation to hand over to."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        attend = _active.get()
        if attend is None:
            # Every modelling file has its own eager function, under this name.
            eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            handed_over = ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)
            output: tuple[Tensor, Tensor | None] = handed_over(module, query, key, value, attention_mask, **options)
            return output
        return attend.attention(module, query, key, value, attention_mask, options), None

    def mask(**options: Any) -> Any:
        attend = _active.get()
        return ALL_MASK_ATTENTION_FUNCTIONS[original](**options) if attend is None else attend.mask(options)

    AttentionInterface.register(_PREFIX + original, attention)
    if original in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(_PREFIX + original, mask)
