"""A paged-KV, continuously batching LLM engine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paged_backend.async_engine import AsyncEngine
    from paged_backend.config import EngineConfig
    from paged_backend.engine import Engine
    from paged_backend.engine_thread import EngineThread
    from paged_backend.errors import (
        DeadlineExceeded,
        EngineDead,
        InvalidArgument,
        Overloaded,
        PagedBackendError,
        UnsupportedModel,
    )
    from paged_backend.request import RequestOptions, RequestOutput, SamplingParams
    from paged_backend.shared_engine import SharedEngine
    from paged_backend.structured_outputs import StructuredOutputs

__version__ = "0.1.0"

_HOME = {
    "AsyncEngine": "async_engine",
    "DeadlineExceeded": "errors",
    "Engine": "engine",
    "EngineConfig": "config",
    "EngineDead": "errors",
    "EngineThread": "engine_thread",
    "InvalidArgument": "errors",
    "Overloaded": "errors",
    "PagedBackendError": "errors",
    "RequestOptions": "request",
    "RequestOutput": "request",
    "SamplingParams": "request",
    "SharedEngine": "shared_engine",
    "StructuredOutputs": "structured_outputs",
    "UnsupportedModel": "errors",
}
__all__ = [
    "AsyncEngine",
    "DeadlineExceeded",
    "Engine",
    "EngineConfig",
    "EngineDead",
    "EngineThread",
    "InvalidArgument",
    "Overloaded",
    "PagedBackendError",
    "RequestOptions",
    "RequestOutput",
    "SamplingParams",
    "SharedEngine",
    "StructuredOutputs",
    "UnsupportedModel",
]


def __getattr__(name: str) -> object:
    # Lazy, so that `paged-backend --help` and Triton's auto-complete process never import torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
