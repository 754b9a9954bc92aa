"""Memory of a KV cache, and of weights on a CPU: in huge pages."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_REGION = 64 << 20  # bytes, at least, that are asked of the system at once
_ALIGNMENT = 64


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU, memory that the system provides only when it is first written, in huge pages where it has them.

    In pages of 4 KB, a block costs faults in every layer when it is first used, and each visit walks through the page
    tables, since the blocks of a batch are far more pages than a core remembers.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes].view(dtype).view(shape)


class Arena:
    """Huge pages for copies of tensors that alone may fill none: weights, which every step reads from end to end.

    They are freed when it and all copies are gone.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy(self, x: Tensor) -> Tensor:
        """A contiguous copy of `x`, of any shape and dtype."""
        nbytes = x.numel() * x.itemsize
        if nbytes > len(self._free):
            self._free = zeros((max(nbytes, _REGION),), torch.uint8, torch.device("cpu"))
        copied = self._free[:nbytes].view(x.dtype).view(x.shape)
        self._free = self._free[-(-nbytes // _ALIGNMENT) * _ALIGNMENT :]
        return copied.copy_(x)
