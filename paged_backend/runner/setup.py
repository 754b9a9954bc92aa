"""From a loaded model to one that serves: fused if it can be, verified, and with the runner that suits it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from paged_kernels.attention import AttentionBackend
from paged_kernels.sampling import sample

from paged_backend.config import EngineConfig
from paged_backend.errors import InvalidArgument, UnsupportedModel
from paged_backend.runner.cache import KVCache
from paged_backend.runner.check import rehearse, verify
from paged_backend.runner.model import PagedModel
from paged_backend.runner.runner import ModelRunner
from paged_backend.runner.sampling import LogitsProcessor, Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the current one of this thread: kernels, events and graphs go to whichever that is."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def default_backend(device: torch.device) -> str:
    """The attention backend that `auto` stands for."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        return "reference"
    # Tiles of the kernels take up to 160 KiB of shared memory, which consumer GPUs do not have.
    major, minor = torch.cuda.get_device_capability(device)
    return "triton" if (major, minor) == (8, 0) or major in (9, 10) else "reference"


def with_defaults_of(backend: AttentionBackend, config: EngineConfig) -> EngineConfig:
    """The configuration with the block size that the backend likes, unless it was set."""
    block_size = getattr(backend, "block_size", None)
    if block_size is None or "block_size" in config.model_fields_set:
        return config
    return config.model_copy(update={"block_size": block_size})


def make_model(
    config: EngineConfig, model: PreTrainedModel, backend: AttentionBackend, max_positions: int
) -> PagedModel:
    """The model over a paged cache. Raises `UnsupportedModel` where that cannot be, and `InvalidArgument`."""
    quantization = config.quantization
    if quantization is not None and model.device.type != "cpu":
        raise InvalidArgument("quantization", quantization, f"is for CPUs; the model is on {model.device}")
    paged = PagedModel(model, backend)
    try:
        layer_kernels = None
        if config.fuse and hasattr(backend, "layer_kernels"):
            layer_kernels = backend.layer_kernels(
                [layer.spec for layer in paged.layers], config.block_size, paged.dtype
            )
        if quantization is not None and not hasattr(getattr(layer_kernels, "Linears", None), "quantize"):
            reason = "needs the compiled CPU kernels, and float32 or bfloat16, block sizes and heads that they support"
            raise InvalidArgument("quantization", quantization, reason)
        if layer_kernels is not None:
            _fuse(paged, config, max_positions, layer_kernels)
        if paged.fused is None:
            verify(paged, config.block_size)
    except BaseException:
        paged.close()
        raise
    return paged


def _fuse(paged: PagedModel, config: EngineConfig, max_positions: int, layer_kernels: ModuleType) -> None:
    from paged_backend.runner.fused import NotFusable

    name, block_size, quantize = type(paged.model).__name__, config.block_size, config.quantization is not None
    try:
        paged.fuse(max_positions, layer_kernels, one_call=config.one_call)
        if paged.device.type == "cuda":
            from paged_kernels.gpu.compilation import compile_ahead

            compile_ahead(lambda: rehearse(paged, block_size), paged.device)
        verify(paged, block_size)
        if quantize:
            assert paged.fused is not None
            paged.fused.linears.quantize()
            rehearse(paged, block_size)  # so that no request waits until the weights are quantised
    except (NotFusable, UnsupportedModel) as reason:
        if quantize:
            raise UnsupportedModel(f"{name} cannot be quantised, since it cannot be fused: {reason}") from reason
        logger.warning("%s runs without fused kernels, and slower: %s", name, reason)
        paged.fused = None


def make_runner(
    config: EngineConfig,
    paged: PagedModel,
    cache: KVCache,
    sampler: Sampler,
    logits_processors: Sequence[LogitsProcessor],
) -> ModelRunner:
    """A runner that leaves tokens on the device, if the model is fused and no plugin wants the logits."""
    has_device_steps = getattr(paged.backend, "has_device_steps", False)
    if paged.fused is None or not has_device_steps or sampler is not sample or logits_processors:
        return ModelRunner(
            paged,
            cache.tables,
            max_model_len=cache.max_model_len,
            sampler=sampler,
            logits_processors=logits_processors,
            swap=cache.swap,
        )
    from paged_backend.runner.device_runner import DeviceRunner

    return DeviceRunner(
        paged,
        cache.tables,
        max_model_len=cache.max_model_len,
        max_num_tokens=config.step_tokens,
        swap=cache.swap,
        cuda_graphs=config.cuda_graphs,
    )
