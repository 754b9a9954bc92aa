"""Compiles many kernels at once; one by one, a first start would take a minute."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction

_patching = threading.Lock()


def compile_ahead(run: Callable[[], object], device: torch.device, launched: Collection[JITFunction[Any]] = ()) -> int:
    """Compile and load in parallel all kernels that `run` launches, without launching them; returns how many.

    Kernels must take tensors and numbers by position, constants and options by name. What they would have written is
    garbage meanwhile; those whose results are used as indices must be among `launched`, and are. Triton keeps what it
    compiled on disk; the next start only reads it.
    """
    owner = threading.get_ident()
    launches: dict[Any, tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]] = {}

    def record(kernel: JITFunction[Any], *args: Any, **options: Any) -> None:
        if kernel in launched or threading.get_ident() != owner:  # another engine may serve meanwhile
            launch_kernel(kernel, *args, **options)
            return
        key = (kernel, *map(_kind, args), *(item for item in options.items() if item[0] != "grid"))
        launches.setdefault(key, (kernel, args, options | {"warmup": True}))

    with _patching:
        launch_kernel, JITFunction.run = JITFunction.run, record
        try:
            run()
        finally:
            JITFunction.run = launch_kernel

    def build(launch: tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]) -> None:
        kernel, args, options = launch
        with torch.cuda.device(device):
            compiled = kernel.run(*args, **options)
            _ = compiled.run  # loads it, and makes its launcher, for which Triton calls a C compiler

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, reversed(launches.values())))  # sampling, the largest by far, is what ends a step
    return len(launches)


def _kind(value: object) -> object:
    """What of an argument Triton compiles a kernel for."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16
    if type(value) is int:
        return value == 1, value % 16 == 0, value > 2**31
    return type(value)
