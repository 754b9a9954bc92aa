"""What the device knows of each slot between steps: one int32 tensor, changed by one packed list a step."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from paged_kernels.gpu.sampling import SamplingTables

from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.runner.batch import BatchState


class DeviceState:
    """Last tokens, sampling parameters and block tables by slot. The host knows what it has sent and sends the rest."""

    def __init__(self, tables: BlockTables, device: torch.device) -> None:
        self._tables = tables
        num_slots = tables.array.shape[1]
        widths = {"last_token": 1, "temperature": 1, "top_k": 1, "top_p": 1, "min_p": 1, "seed": 2}
        self.tensor = torch.zeros(
            num_slots * sum(widths.values()) + math.prod(tables.array.shape), dtype=torch.int32, device=device
        )
        self._offset, at = {}, 0
        views = {}
        for name, width in widths.items():
            self._offset[name], end = at, at + num_slots * width
            views[name], at = self.tensor[at:end], end
        self._offset["tables"] = at
        self.block_tables = self.tensor[at:].view(tables.array.shape)
        """`[groups, slots, max_blocks]`."""
        self.sampling = SamplingTables(
            temperature=views["temperature"].view(torch.float32),
            top_k=views["top_k"],
            top_p=views["top_p"].view(torch.float32),
            min_p=views["min_p"].view(torch.float32),
            seed=views["seed"].view(num_slots, 2),
            last_token=views["last_token"],
        )
        self._num_sent = np.zeros(num_slots, dtype=np.int64)
        """Blocks of each slot's tables that the device has."""
        self._changes: dict[int, int] = {}

    def load(self, slot: int, state: BatchState, last_token: int) -> None:
        """Send the row of a slot anew: parameters, last token, and in time its blocks."""
        self._num_sent[slot] = 0
        changes, offset = self._changes, self._offset
        changes[offset["last_token"] + slot] = last_token
        changes[offset["top_k"] + slot] = min(int(state.top_k[slot]), 2**31 - 1)
        for name in ("temperature", "top_p", "min_p"):
            changes[offset[name] + slot] = int(getattr(state, name)[slot].view(np.int32))
        low, high = state.seed[slot : slot + 1].view(np.int32).tolist()
        changes[offset["seed"] + 2 * slot], changes[offset["seed"] + 2 * slot + 1] = low, high

    def take_changes(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Pairs (index, value) `[n, 2]` of what has changed, and of blocks of `slots` that the device has not seen."""
        tables, pairs = self._tables, [np.array(list(self._changes.items()), dtype=np.int32).reshape(-1, 2)]
        self._changes.clear()
        groups, num_slots, width = tables.array.shape
        for slot in slots[tables.lengths[slots] > self._num_sent[slots]].tolist():
            columns = np.arange(self._num_sent[slot], tables.lengths[slot])
            self._num_sent[slot] = tables.lengths[slot]
            index = self._offset["tables"] + (np.arange(groups)[:, None] * num_slots + slot) * width + columns
            pairs.append(np.stack([index.ravel(), tables.array[:, slot, columns].ravel()], 1).astype(np.int32))
        return np.concatenate(pairs)
