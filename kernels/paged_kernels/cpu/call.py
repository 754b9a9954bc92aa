"""Calls of the compiled kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from paged_kernels.cpu import library


def call(name: str, *arguments: Tensor | int | ctypes.c_float | None) -> None:
    """Call a kernel with the addresses of tensors, numbers, and as the last argument how many threads to use."""
    kernels = library.load()
    assert kernels is not None
    converted = [
        ctypes.c_void_p(argument.data_ptr())
        if isinstance(argument, Tensor)
        else ctypes.c_int64(argument)
        if isinstance(argument, int)
        else argument
        for argument in arguments
    ]
    getattr(kernels, name)(*converted, torch.get_num_threads())
