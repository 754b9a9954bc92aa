"""What the device must know of each running request, one row ("slot") each, and the flat batch of a step."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from paged_kernels.sampling import SamplingBatch

from paged_backend.request import Request
from paged_backend.runner.sampling import uniform
from paged_backend.runner.scored_prompts import ScoredPrompts
from paged_backend.scheduler.plan import StepPlan


@dataclass(slots=True)
class FlatBatch:
    """The tokens of a step's rows, end to end."""

    input_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    slot_mapping: npt.NDArray[np.int64]
    """`[groups, tokens]`: where each group of layers writes each token, `block * block_size + offset`."""
    block_tables: npt.NDArray[np.int32]
    """`[groups, rows, blocks]`."""
    logits_at: npt.NDArray[np.int64]
    """Where in the flat batch the rows that sample end, then the tokens of `ScoredPrompts`."""


class BatchState:
    """Arrays indexed by slot. A row is loaded when its request gets the slot and then only appended to."""

    def __init__(self, num_slots: int, max_model_len: int) -> None:
        self.tokens = np.zeros((num_slots, max_model_len), dtype=np.int32)
        self.temperature = np.zeros(num_slots, dtype=np.float32)
        self.top_k = np.zeros(num_slots, dtype=np.int64)
        self.top_p = np.ones(num_slots, dtype=np.float32)
        self.min_p = np.zeros(num_slots, dtype=np.float32)
        self.seed = np.zeros(num_slots, dtype=np.uint64)

    def load(self, request: Request) -> None:
        """Fill the row of a request that just got its slot."""
        slot, params = request.slot, request.params
        count = len(request.token_ids)
        # Half the time that numpy takes for a list.
        self.tokens[slot, :count] = np.frombuffer(struct.pack(f"{count}i", *request.token_ids), dtype=np.int32)
        self.temperature[slot], self.top_k[slot] = params.temperature, params.top_k
        self.top_p[slot], self.min_p[slot], self.seed[slot] = params.top_p, params.min_p, request.seed

    def flatten(self, plan: StepPlan, tables: npt.NDArray[np.int32], block_size: int) -> FlatBatch:
        """The flat batch of a plan; `tables` is `BlockTables.array`."""
        ends = np.cumsum(plan.counts)
        row = np.repeat(np.arange(len(plan.slots)), plan.counts)
        positions = np.arange(ends[-1]) - (ends - plan.counts - plan.starts)[row]
        block_tables = tables[:, plan.slots, : -(-int((plan.starts + plan.counts).max()) // block_size)]
        return FlatBatch(
            input_ids=self.tokens[plan.slots[row], positions].astype(np.int64),
            positions=positions,
            slot_mapping=block_tables[:, row, positions // block_size].astype(np.int64) * block_size
            + positions % block_size,
            block_tables=block_tables,
            logits_at=np.concatenate([(ends - 1)[plan.samples], ScoredPrompts(plan).places]),
        )

    def sampling(self, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> SamplingBatch:
        """Parameters to sample the tokens that will stand at `positions` of `slots`."""
        return SamplingBatch(
            temperature=self.temperature[slots],
            top_k=self.top_k[slots],
            top_p=self.top_p[slots],
            min_p=self.min_p[slots],
            uniform=uniform(self.seed[slots], positions),
        )

    def append(
        self, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]
    ) -> None:
        """Store sampled tokens. One at the very end of the context has no next step, and no room."""
        fits = positions < self.tokens.shape[1]
        self.tokens[slots[fits], positions[fits]] = tokens[fits]
