"""One engine on a device that is a formula: the real scheduler, driven by a clock of events."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import cast

import numpy as np

from paged_backend.plugins.manager import PluginManager
from paged_backend.request import Request
from paged_backend.scheduler.plan import StepPlan
from paged_backend.scheduler.policy import SchedulingPolicy
from paged_backend.simulate.names import PAGED
from paged_backend.simulate.outcomes import Outcomes
from paged_backend.simulate.router import Fleet
from paged_backend.simulate.setup import Setup, Watch
from paged_backend.simulate.step_time import steps_within, total
from paged_backend.simulate.timeline import Timeline
from paged_backend.simulate.trace import Ints


@dataclass(slots=True, eq=False)
class SimulatedRequest(Request):
    """A request whose tokens are only counted: `token_ids` is a range."""

    number: int = 0
    """Its row in the trace."""
    last_slot: int = -1

    def hash_blocks(self, block_size: int) -> None:
        """Only the blocks of a shared prefix have hashes, given at the start; no token is ever hashed."""

    def set_length(self, length: int) -> None:
        """It has so many tokens now."""
        self.token_ids = cast("list[int]", range(length))

    def name_blocks(self, count: int) -> None:
        """Let its first `count` blocks be found, by itself alone after the shared ones."""
        known = len(self.block_hashes)
        if count > known:
            own = [struct.pack("<qqq", self.number, index, 0) for index in range(known, count)]
            self.block_hashes = self.block_hashes + own  # the list it began with is shared


class Replica:
    """Time passes from event to event: a request arrives, a step ends, or a row of decode steps that was put off ends.

    Such a row is put off because the next arrival, which may cut it short, is not known yet; its end is known.
    """

    due: float = math.inf
    """Seconds at which the next event is, without further arrivals; infinite when there is nothing to do."""

    def __init__(
        self,
        index: int,
        setup: Setup,
        plugins: PluginManager,
        outcomes: Outcomes,
        fleet: Fleet,
        timeline: Timeline,
        longest: int,
    ) -> None:
        self.index, self._outcomes, self._fleet, self._timeline = index, outcomes, fleet, timeline
        self.scheduler = setup.make_scheduler(plugins, longest, Watch(self._is_preempted))
        self._tables, self._step_time = self.scheduler.tables, setup.make_step_time()
        self._paged, self._fast_forward = setup.reserve == PAGED, setup.fast_forward
        self._max_waiting = setup.config.max_waiting
        self._block_seconds = setup.block_bytes / setup.device.host_bytes_per_second
        policy = type(self.scheduler.policy)
        self._fcfs = policy is SchedulingPolicy
        self._displaces = policy.displaces is not SchedulingPolicy.displaces
        count = setup.config.max_num_seqs
        self._number, self._length, self._limit, self._computed = (np.zeros(count, dtype=np.int64) for _ in range(4))
        """By slot; the last three are 0 where nothing runs."""
        self._fresh = np.zeros(count, dtype=bool)
        """Slots whose requests have no token yet."""
        self._num_fresh = 0
        self.now = 0.0
        """Seconds at which the last step ended, or the next one can begin."""
        self._plan: StepPlan | None = None
        self._done: list[SimulatedRequest] = []
        """Requests that end with the plan."""
        self._first_numbers = np.zeros(0, dtype=np.int64)
        """Requests whose first token comes with the plan."""
        self._row: tuple[int, tuple[float, float]] | None = None
        """A row of decode steps that was put off: how many, and their seconds as `StepTime.line` gives them."""
        self._decoding = np.zeros(0, dtype=np.int64)
        """Slots of the last plan that decode next."""
        self._stuck = False
        """The last step admitted nobody and nothing changed since: the next one admits nobody either."""
        self._full = False
        """Somebody waits because there was no room for him."""

    # ---- events

    def accept(self, request: SimulatedRequest, time: float) -> None:
        """A request arrives. Everything due before `time` must have been run."""
        if self._row is not None:
            self._run_row_until(time)
        number, outcomes = request.number, self._outcomes
        outcomes.replica[number] = self.index
        if len(self.scheduler.waiting) >= self._max_waiting:
            outcomes.refused[number] = True
            outcomes.num_ended += 1
            return
        self._fleet.requests[self.index] += 1
        self._fleet.tokens[self.index] += request.max_total_tokens
        self.scheduler.add(request)
        if not self._fcfs:
            self._stuck = False  # it may be the one that fits
        if self.due == math.inf:
            self.now = self.due = time

    def run_due(self) -> None:
        """What is due happens, and what comes next is planned."""
        if self._plan is not None:
            self._complete()
        elif self._row is not None:
            steps, line = self._row
            self._launch(steps, line)
            return
        self._begin()

    def _run_row_until(self, time: float) -> None:
        """The row of steps that was put off is cut where a request arrives."""
        while self._row is not None or self.due < time:
            if self._row is None:
                self.run_due()
            elif self.now < time:
                self._launch(steps_within(self._row[1], time - self.now), self._row[1])
            else:
                self._row, self.due = None, self.now

    def _begin(self) -> None:
        """At the beginning of a step: put off a row of decode steps, or launch one step."""
        scheduler = self.scheduler
        running = scheduler.num_running
        if running == len(self._decoding) and running and not self._num_fresh and self._fast_forward:
            waiting = len(scheduler.waiting) > 0
            if not waiting or self._stuck or not (self._displaces or self._tables.num_free_slots):
                slots = self._decoding
                lengths = self._length[slots]
                steps = int((self._limit[slots] - lengths).min())
                if steps > 1:
                    line = self._step_time.line(0, running, running, int(lengths.sum()), 0)
                    self._row = steps, line
                    self.due = self.now + total(line, steps)
                    return
        if scheduler.has_work:
            self._launch(1, None)
        else:
            self.due = math.inf

    def _launch(self, most: int, line: tuple[float, float] | None) -> None:
        """Plan up to `most` steps in a row, and let the device run them until `due`."""
        self._row = None
        plan = self.scheduler.schedule(most)
        slots, steps = plan.slots, plan.num_steps
        for request in plan.preempted:
            self._outcomes.preemptions[cast(SimulatedRequest, request).number] += 1
        for request in plan.admitted:
            self._is_admitted(cast(SimulatedRequest, request))
        rows, ends = len(slots), plan.starts + plan.counts
        prefill = pairs = 0
        decodes = rows
        if rows and plan.counts[-1] > 1:  # rows of one token come first
            decodes = int((plan.counts == 1).sum())
            counts = plan.counts[decodes:]
            prefill = int(counts.sum())
            pairs = int((counts * (plan.starts[decodes:] + ends[decodes:] + 1)).sum()) // 2
        if line is None or prefill or decodes != len(self._decoding) or plan.preempted:
            line = self._step_time.line(prefill, decodes, len(plan.sampling), int(ends.sum()), pairs)
        seconds = total(line, steps) if rows else 0.0
        moves = plan.moves
        if moves.stores or moves.fetches:
            seconds += (len(moves.stores) + len(moves.fetches)) * self._block_seconds
        assert rows or plan.preempted, "a step with work to do did none"
        self.due = self.now + seconds
        self._plan = plan
        self._note(plan, slots, ends, prefill, decodes)

    def _note(self, plan: StepPlan, slots: Ints, ends: Ints, prefill: int, decodes: int) -> None:
        """Keep what the plan does by slot, who gets a first token by it and who ends."""
        steps, scheduler = plan.num_steps, self.scheduler
        self._computed[slots] = ends + (steps - 1)
        if len(plan.sampling) < len(slots):
            slots, ends = slots[plan.samples], ends[plan.samples]
        lengths = ends + steps
        self._length[slots] = lengths
        last = lengths >= self._limit[slots]
        self._done = []
        self._decoding = slots
        if self._num_fresh:
            fresh = slots[self._fresh[slots]]
            self._first_numbers = self._number[fresh]
            self._fresh[fresh] = False
            self._num_fresh -= len(fresh)
        if last.any():
            self._done = [cast(SimulatedRequest, plan.sampling[row]) for row in np.flatnonzero(last).tolist()]
            self._decoding = slots[~last]
        waiting = len(scheduler.waiting)
        self._stuck = bool(waiting) and not (plan.admitted or plan.preempted or prefill or self._done)
        budget = scheduler.max_num_batched_tokens - decodes
        if decodes:
            budget = min(budget, scheduler.max_prefill_tokens)
        if not waiting:
            self._full = False
        elif plan.preempted or prefill + len(plan.admitted) < budget - 1:
            # It was not the budget that kept the next one out. Chunks of one token are not in `prefill`.
            self._full = True
        self._measure(len(slots) * (steps - 1) / 2, waiting)

    def _complete(self) -> None:
        """The planned steps have ended."""
        self._plan = None
        self.now = now = self.due
        self.scheduler.end_step()
        outcomes, fleet = self._outcomes, self._fleet
        if len(self._first_numbers):
            outcomes.first[self._first_numbers] = now
            self._first_numbers = self._first_numbers[:0]
        for request in self._done:
            slot, number, length = request.slot, request.number, request.max_total_tokens
            request.set_length(length)
            request.end("length")
            self.scheduler.remove(request)
            self._length[slot] = self._limit[slot] = self._computed[slot] = 0
            outcomes.ended[number] = now
            outcomes.num_ended += 1
            fleet.requests[self.index] -= 1
            fleet.tokens[self.index] -= length

    # ---- requests

    def _is_admitted(self, request: SimulatedRequest) -> None:
        slot, number, outcomes = request.slot, request.number, self._outcomes
        request.last_slot = slot
        self._number[slot], self._limit[slot] = number, request.max_total_tokens
        self._length[slot] = len(request.token_ids)
        if math.isnan(outcomes.started[number]):
            outcomes.started[number] = self.now
            outcomes.cached[number] = request.num_cached_tokens
        if math.isnan(outcomes.first[number]):
            self._fresh[slot] = True
            self._num_fresh += 1

    def _is_preempted(self, request: Request) -> None:
        """It keeps its tokens, and its blocks can be found again until others need them, as those of a real one."""
        request = cast(SimulatedRequest, request)
        slot = request.slot
        request.set_length(int(self._length[slot]))
        if self._paged:
            request.name_blocks(int(self._computed[slot]) // self._tables.block_size)
        self._length[slot] = self._limit[slot] = self._computed[slot] = 0
        self._num_fresh -= int(self._fresh[slot])
        self._fresh[slot] = False

    # ---- memory

    def _measure(self, ahead: float, waiting: int) -> None:
        """Tokens in memory until `due`; over a row of steps, in its middle: `ahead` tokens before its end."""
        tables = self._tables
        held = tables.lengths * tables.block_size
        num_held, num_kept = int(held.sum()), int(np.minimum(held, self._limit).sum())
        num_computed = int(self._computed.sum())
        reserved = float(num_kept - num_computed)
        # Blocks that several hold are counted once.
        used = tables.pool.num_used * tables.block_size - (num_held - num_computed) - ahead
        if not self._paged:
            reserved += ahead
        self._timeline.add(
            self.now,
            self.due,
            (self.scheduler.num_running, waiting, used, reserved, num_held - num_kept, 1),
            self._full,
        )
