"""The tensors behind the host blocks, and the copies between them and the device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from paged_backend.kv_cache.storage import KVStorage

_STAGED_BYTES = 1 << 26  # on the device, for one batch of copies


class SwapSpace:
    """Host blocks, pinned when the device is a GPU: all layers of a block are one run of bytes, copied at once.

    On a GPU the copies are queued on the current stream like any kernel; nothing waits for them.
    """

    def __init__(self, storage: KVStorage, num_blocks: int) -> None:
        """Blocks 1..num_blocks; 0 is not used, as on the device."""
        self._storage = storage
        self._device = storage.tensors[0].device
        self._sizes = [tensor[0].numel() * tensor.element_size() for tensor in storage.tensors]
        self._bytes = sum(self._sizes)
        self._blocks = torch.empty(
            num_blocks + 1, self._bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda"
        )

    def store(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (device, host)."""
        for batch in self._batches(pairs):
            at = self._storage.indices([device for device, _ in batch])
            staged = torch.cat([self._raw(tensor).index_select(0, at) for tensor in self._storage.tensors], dim=1)
            for row, (_, host) in zip(staged, batch, strict=True):
                self._blocks[host].copy_(row, non_blocking=True)

    def fetch(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (host, device)."""
        for batch in self._batches(pairs):
            at = self._storage.indices([device for _, device in batch])
            staged = torch.empty(len(batch), self._bytes, dtype=torch.uint8, device=self._device)
            for row, (host, _) in zip(staged, batch, strict=True):
                row.copy_(self._blocks[host], non_blocking=True)
            for tensor, part in zip(self._storage.tensors, torch.split(staged, self._sizes, dim=1), strict=True):
                self._raw(tensor).index_copy_(0, at, part)

    def measure(self) -> float:
        """Bytes per second of copies of 16 blocks, the slower way; the device's contents are left as they are."""
        hosts = range(min(1, len(self._blocks) - 1), min(17, len(self._blocks)))
        seconds = 0.0
        for copy, pairs in (
            (self.store, [(0, host) for host in hosts]),
            (self.fetch, [(host, 0) for host in hosts]),
        ):
            copy(pairs)  # the first allocates
            self._wait()
            began = time.perf_counter()
            for _ in range(4):
                copy(pairs)
            self._wait()
            seconds = max(seconds, (time.perf_counter() - began) / 4)
        return self._bytes * len(hosts) / seconds

    def _batches(self, pairs: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
        size = max(1, _STAGED_BYTES // self._bytes)
        return (pairs[at : at + size] for at in range(0, len(pairs), size))

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @staticmethod
    def _raw(tensor: Tensor) -> Tensor:
        """`[blocks, bytes of one]` of the same memory."""
        return tensor.flatten(1).view(torch.uint8)
