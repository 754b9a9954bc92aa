"""Puts the engine under `model.generate(...)`, and takes it out again.

generate() looks its decode loop up on the class of the model, so patching is a swap of `model.__class__` for a
subclass with its own `_sample`. Everything before it (defaults, checks, processors, expansion) stays transformers'
own; beam search and assisted decoding have other loops and are untouched.
"""

from __future__ import annotations

import sys
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from hf_integration.rows import Rows
from hf_integration.translate import NotServed, check_call, sampling_params, unpadded_prompts
from paged_backend.config import EngineConfig
from paged_backend.engine import Engine
from paged_backend.errors import InvalidArgument
from paged_backend.runner.attention import detach
from paged_backend.shared_engine import SharedEngine
from paged_backend.stats import EngineStats


@dataclass(frozen=True)
class GenerateStats:
    """Calls of generate() on one patched model that reached the decode loop of greedy search and sampling."""

    served: int
    """Run by the engine."""
    fallback: int
    """Run by transformers."""
    reasons: dict[str, int]
    """Why, and how often."""
    engine: EngineStats


@dataclass
class _Patch:
    """What a patched model carries."""

    config: EngineConfig
    strict: bool
    engine: SharedEngine
    weights: tuple[torch.device, torch.dtype]
    attention: str
    served: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises `NotServed` when the engine would not compute what the model computes now."""
        if model.training:
            raise NotServed("a model in training mode (model.eval() leaves it)")
        if (model.device, model.dtype) != self.weights:
            raise NotServed("a model moved or cast since patch (unpatch and patch it again)")
        if model.config._attn_implementation != self.attention:
            raise NotServed("an attention implementation set since patch (unpatch and patch it again)")
        if torch.is_autocast_enabled(model.device.type):
            raise NotServed("torch.autocast")

    def check_length(self, prompts: list[list[int]], max_tokens: int) -> None:
        """Raises `NotServed` when a row could outgrow the engine; transformers has no such bound."""
        if max(map(len, prompts)) + max_tokens > self.engine.engine.max_model_len:
            raise NotServed(f"max_length beyond the engine's max_model_len={self.engine.engine.max_model_len}")

    def stats(self) -> GenerateStats:
        """A snapshot."""
        with self.lock:
            return GenerateStats(self.served, self.reasons.total(), dict(self.reasons), self.engine.stats())

    def fall_back(self, reason: NotServed) -> None:
        """Count the call, and warn when its reason is new; raises it instead when strict."""
        if self.strict:
            raise reason
        with self.lock:
            self.reasons[reason.argument] += 1
            first = self.reasons[reason.argument] == 1
        if first:
            warnings.warn(f"{reason}; this call ran on the original generate", stacklevel=_stacklevel_of_the_caller())


def _stacklevel_of_the_caller() -> int:
    """For a warning of the function that calls this: the first frame that is not ours, transformers' or torch's."""
    packages = {__package__, "transformers", "torch"}
    names = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_stack(sys._getframe(1)))
    return next((level for level, name in enumerate(names, 1) if name.partition(".")[0] not in packages), 1)


class _PagedGenerate:
    """Goes before the model's own class, whose `_sample` serves what the engine does not."""

    def _sample(
        self: Any,
        input_ids: torch.Tensor,
        logits_processor: list[Any],
        stopping_criteria: list[Any],
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        patch: _Patch = self._paged
        try:
            patch.check_model(self)
            check_call(generation_config, synced_gpus, model_kwargs)
            prompts = unpadded_prompts(input_ids, model_kwargs)
            do_sample = bool(generation_config.do_sample)
            params = sampling_params(logits_processor, stopping_criteria, do_sample, input_ids.shape[1])
            patch.check_length(prompts, params.max_tokens)
        except NotServed as reason:
            patch.fall_back(reason)
            return super()._sample(  # type: ignore[misc]
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )
        with patch.lock:
            patch.served += 1
        row_params = [params] * len(prompts)
        if do_sample:
            # One draw from the global generator, so that torch.manual_seed repeats the call.
            seeds = torch.randint(2**63 - 1, (len(prompts),)).tolist()
            row_params = [params.model_copy(update={"seed": seed}) for seed in seeds]
        rows = Rows(
            patch.engine,
            len(prompts),
            # Without an EOS criterion all rows end together, and nothing is padded.
            pad=0 if generation_config._pad_token_tensor is None else int(generation_config._pad_token_tensor),
            on_column=None if streamer is None else lambda column: streamer.put(torch.tensor(column)),
        )
        tokens = rows.run(prompts, row_params)
        if streamer is not None:
            streamer.end()
        return torch.cat([input_ids, torch.tensor(tokens, device=input_ids.device)], dim=1)

    def __copy__(self: Any) -> Any:
        # A shallow copy shares its config with this model, so it must keep the attention implementation named there.
        plain = _plain_class(self)
        copy = plain.__new__(plain)
        copy.__setstate__(_plain_state(self))
        return copy

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # Copies and pickles are plain models: an engine has a thread and a cache, and this class cannot be imported.
        return _blank, (_plain_class(self),), _plain_state(self)

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        self.__class__ = _plain_class(self)
        self.__setstate__(state)
        detach(self)


def patch(model: PreTrainedModel, *, strict: bool = False, **engine_config: Any) -> PreTrainedModel:
    """Serve `model.generate(...)` from a paged, continuously batching engine, in place; returns the model.

    `engine_config` are fields of `EngineConfig`. The weights are shared, not copied; ordinary forwards and training
    go on working. Calls of generate() from several threads are batched together. Greedy search, and sampling with
    temperature, top_k, top_p and min_p, are served; a call that needs more runs on the original generate, with one
    warning for each reason, or raises `NotServed` when `strict`. Greedy tokens are those of transformers. Sampled ones
    follow the same distribution by other draws; their seeds come from torch's global CPU generator. Rows of one call
    that begin alike share what is computed; calls do so with `enable_prefix_caching=True`, and then a change of the
    weights must be told by `reset_prefix_cache(model)`.

    Raises `UnsupportedModel` when the model cannot run over a paged cache, and `InvalidArgument` for a bad field of
    `engine_config` or a model already patched in another way.
    """
    if not isinstance(model, GenerationMixin):
        raise InvalidArgument("model", type(model).__name__, "must be a transformers model with generate()")
    if model.training:
        raise InvalidArgument("model.training", True, "must be False; call model.eval() first")
    config = EngineConfig(**{"enable_prefix_caching": False} | engine_config)
    patched = _patch_of(model)
    if patched is None:
        engine = SharedEngine(Engine(config, model=model))
        model._paged = _Patch(config, strict, engine, (model.device, model.dtype), model.config._attn_implementation)
        model.__class__ = _paged_class(type(model))
    elif (patched.config, patched.strict) != (config, strict):
        raise InvalidArgument("model", type(model).__name__, "is patched with another configuration; unpatch it first")
    return model


def unpatch(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `patch`: free the cache, and give the model its class and attention back; returns the model.

    Calls that still run in the engine raise `EngineDead`. Does nothing to a model that is not patched.
    """
    patched = _patch_of(model)
    if patched is not None:
        patched.engine.close()
        model.__class__ = _plain_class(model)
        del model._paged
    return model


def reset_prefix_cache(model: PreTrainedModel) -> None:
    """Forget what earlier calls computed, after a change of the weights. Raises `InvalidArgument` if not patched."""
    _require_patch(model).engine.reset_prefix_cache()


@contextmanager
def paged(model: PreTrainedModel, *, strict: bool = False, **engine_config: Any) -> Iterator[PreTrainedModel]:
    """`patch` on entering, `unpatch` on leaving."""
    patch(model, strict=strict, **engine_config)
    try:
        yield model
    finally:
        unpatch(model)


def stats(model: PreTrainedModel) -> GenerateStats:
    """What became of the calls of generate() since `patch`. Raises `InvalidArgument` if the model is not patched."""
    return _require_patch(model).stats()


def _require_patch(model: PreTrainedModel) -> _Patch:
    patched = _patch_of(model)
    if patched is None:
        raise InvalidArgument("model", type(model).__name__, "must be patched")
    return patched


def _patch_of(model: PreTrainedModel) -> _Patch | None:
    patched: _Patch | None = model.__dict__.get("_paged")
    return patched


def _paged_class(plain: type) -> Any:
    # Same name and module: transformers writes them into configs, and finds pipelines and source files by them.
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain.__name__, (_PagedGenerate, plain), names)


def _plain_class(model: PreTrainedModel) -> Any:
    return type(model).__mro__[2]


def _plain_state(model: PreTrainedModel) -> dict[str, Any]:
    return {name: value for name, value in model.__getstate__().items() if name != "_paged"}


def _blank(plain: type) -> Any:
    """An empty patched model, which `__setstate__` turns into a plain one."""
    paged_class = _paged_class(plain)
    return paged_class.__new__(paged_class)
