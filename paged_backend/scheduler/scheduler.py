"""Iteration-level scheduling: every step mixes decodes with prefill chunks under one token budget.

Continuous batching is Orca's (Yu et al., OSDI 2022), chunked prefill is Sarathi-Serve's (Agrawal et al., OSDI 2024).
What a step needs of the running requests is kept in arrays by slot, so that planning a step is a few array operations
however many run; Python touches a request only when it gets a block, a chunk of its prompt, or a slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.kv_cache.groups import blocks_needed
from paged_backend.kv_cache.host_tier import HostTier
from paged_backend.kv_cache.prefix_cache import PrefixCache
from paged_backend.request import Request, RequestStatus
from paged_backend.scheduler.plan import StepPlan
from paged_backend.scheduler.policy import SchedulingPolicy, WaitingQueue
from paged_backend.scheduler.preemption import LowestRanked, PreemptionCosts, PreemptionPolicy

_MOST_SCORED = 256  # prompt tokens of a step that need logits: each takes as many floats as there are tokens to choose


class Scheduler:
    """Owns the waiting and the running requests and decides each step. Single-threaded."""

    def __init__(
        self,
        policy: SchedulingPolicy,
        tables: BlockTables,
        *,
        max_num_batched_tokens: int,
        max_prefill_tokens: int | None = None,
        preemption: PreemptionPolicy | None = None,
        costs: PreemptionCosts | None = None,
        host: HostTier | None = None,
        prefers_whole: Callable[[int], bool] = lambda num_tokens: False,
    ) -> None:
        """`max_prefill_tokens` bounds the prompt tokens of a step that also decodes; None: only the budget does.

        `prefers_whole` says which lengths of prompts are computed faster whole than in chunks.
        """
        self.policy, self.tables, self.host = policy, tables, host
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_prefill_tokens = max_prefill_tokens or max_num_batched_tokens
        self.preemption = preemption or LowestRanked(swap=False)
        self.costs = costs or PreemptionCosts()
        if host is not None:
            tables.pool.on_evict = self._evicted
        self.prefix_cache = PrefixCache(tables, host)
        self._prefers_whole = prefers_whole
        self._displaces = type(policy).displaces is not SchedulingPolicy.displaces
        self.waiting = WaitingQueue(policy)
        self.num_preempted = self.num_swapped = self.num_cached_tokens = self.num_queried_tokens = 0
        """Since the start; the last two count prompt tokens: found in the cache, and looked for there."""
        num_slots = tables.array.shape[1]
        self._requests: list[Request | None] = [None] * num_slots
        self._num_running = 0
        self._length = np.zeros(num_slots, dtype=np.int64)
        """Tokens each slot has, those that planned steps will sample included."""
        self._computed = np.zeros(num_slots, dtype=np.int64)
        """Tokens whose K and V are in the cache, or will be after the planned steps."""
        self._limit = np.zeros(num_slots, dtype=np.int64)
        self._steered = np.zeros(num_slots, dtype=bool)
        """Slots whose next token is not their own sample (beams)."""
        self._loads: list[Request] = []
        self._copies: list[tuple[int, int]] = []
        self._most = 0
        """Prompt tokens that the step which is planned may have."""
        self._lost: set[int] = set()
        """Slots whose requests were preempted while this step is planned."""
        self._chosen: set[Request] = set()
        """Requests with a prefill chunk in the step that is planned: their blocks can be found already."""
        self._blocks_at_most = [group.most_blocks(tables.block_size, max_num_batched_tokens) for group in tables.groups]

    # ---- requests

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return self._num_running > 0 or len(self.waiting) > 0

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return self._num_running

    @property
    def running(self) -> Iterator[Request]:
        """Requests with a slot, by slot."""
        return (request for request in self._requests if request is not None)

    def add(self, request: Request) -> None:
        """Let a new request wait for its turn."""
        self.waiting.add(request)

    def remove(self, request: Request) -> None:
        """Forget a request that ended, and free what it holds."""
        self.release(request)
        self.policy.ended(request)

    def release(self, request: Request) -> None:
        """Take a request out of its slot or the queue, and free what it holds: a beam that is not continued."""
        if request.slot >= 0:
            if self._computed[request.slot] < self._length[request.slot] - 1:
                # In the middle of its prompt: nobody has seen whether what it computed is finite.
                pool = self.tables.pool
                pool.taint(block for block in self.tables.blocks(request.slot) if pool.holders(block) == 1)
            self._vacate(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._drop_swapped(request)

    def taint(self, requests: Iterable[Request]) -> None:
        """The K and V of these may hold NaN, and so may what they gave back, such as blocks behind their window.

        None of it can be found any more, and nobody gets it uncleared.
        """
        for request in requests:
            if request.slot >= 0:
                self.tables.pool.taint(self.tables.blocks(request.slot))
        self.tables.pool.taint_unheld()

    def fork(self, parent: Request, child: Request) -> None:
        """Start `child`, whose tokens are the computed ones of `parent` and one more, with the same blocks.

        Without a slot or a block for it, or when the parent has been preempted, it waits and computes on its own.
        """
        child.block_hashes = list(parent.block_hashes)
        if parent.slot >= 0 and self.tables.num_free_slots:
            slot, computed = self.tables.take_slot(), int(self._computed[parent.slot])
            copies = self.tables.fork(parent.slot, slot, computed)
            if copies is not None:
                self._copies += copies
                self.prefix_cache.forked(parent.slot, slot)
                child.sort_key = parent.sort_key
                self._occupy(child, slot, computed)
                return
            self.tables.release(slot)
        child.status = RequestStatus.WAITING
        self.waiting.add(child)

    def steered(self, request: Request) -> None:
        """A request that does not follow its own samples has got its next token."""
        if request.slot >= 0:
            self._length[request.slot] = len(request.token_ids)
            self._loads.append(request)

    # ---- steps

    def schedule(self, max_steps: int = 1) -> StepPlan:
        """Plan the next step and count its tokens as computed. Answer every plan with `end_step`, in order.

        Decodes come before prefill chunks, so neither a long prompt nor a burst of arrivals stalls a running
        request. With `max_steps`, a step of decodes alone may be planned several times over, while nothing else can
        happen.
        """
        plan = StepPlan()
        self._lost.clear()
        self._chosen.clear()
        left = np.minimum(self._length, self._limit - 1) - self._computed
        decodes = self._room_for_decodes(np.flatnonzero(left == 1), plan)
        chunks = self._prefills(left, len(decodes), plan)
        if self._lost:
            decodes = decodes[[slot not in self._lost for slot in decodes.tolist()]]
        if max_steps > 1 and len(decodes) == self._num_running and not chunks and not plan.preempted:
            plan.num_steps = self._steps_ahead(decodes, max_steps)
        self._complete(plan, decodes, chunks)
        self.tables.plan_step()  # only now: it does not write to what was released while it was planned
        return plan

    def end_step(self) -> None:
        """The oldest planned step has ended on the device: what was given back since may be used again."""
        self.tables.end_step()

    def cancel(self) -> None:
        """Forget all that planned steps would have done, as after one that failed: every request starts again."""
        for request in list(self.running):
            self._preempt(request, StepPlan(), keep=False)
        self.prefix_cache.reset()
        if self.host is not None:
            self.host.take()
        self._copies.clear()
        self._loads.clear()
        while self.tables.steps_in_flight:
            self.tables.end_step()
        self.tables.pool.taint_unheld()  # who knows what was written, and what was cleared

    def _room_for_decodes(self, slots: npt.NDArray[np.int64], plan: StepPlan) -> npt.NDArray[np.int64]:
        """A block for each decode that begins one; returns the slots that have room, or lose it later."""
        tables = self.tables
        crossing = slots[self._computed[slots] == tables.lengths[slots] * tables.block_size]
        for slot in crossing.tolist():
            self._register(slot, int(self._computed[slot]))
            tables.trim(slot, int(self._computed[slot]))
        if tables.grow_by_one(crossing):
            return slots
        stalled: set[int] = set()
        for request in sorted((self._at(slot) for slot in crossing.tolist()), key=lambda request: request.rank):
            slot = request.slot
            if slot >= 0 and not self._make_room(request, int(self._computed[slot]) + 1, plan):
                stalled.add(slot)
        return slots[[slot not in stalled for slot in slots.tolist()]]

    def _prefills(self, left: npt.NDArray[np.int64], num_decodes: int, plan: StepPlan) -> list[tuple[int, int]]:
        """Chunks (slot, tokens) of running and waiting requests, in the order of the policy, as the budget allows."""
        budget = self.max_num_batched_tokens - num_decodes
        if num_decodes:
            budget = min(budget, self.max_prefill_tokens)
        self._most = budget
        started = deque(
            sorted((self._at(slot) for slot in np.flatnonzero(left > 1).tolist() if slot not in self._lost), key=_rank)
        )
        chunks: list[tuple[int, int]] = []
        spare: int | None = None
        admitting = not plan.preempted
        scored = 0
        while budget > 0:
            head = self.waiting.peek() if admitting else None
            if head is not None and head.prompt_logprobs is not None and scored >= _MOST_SCORED:
                admitting, head = False, None
            if head is not None and not (started and started[0].rank < head.rank):
                if spare is None:
                    spare = self._spare()
                admitted = self._admit(head, self._most_of(head, budget, scored), spare, plan)
                if admitted is None:
                    admitting = False
                    continue
                spare, count = admitted
                request = head
            elif started:
                request = started.popleft()
                if request.slot < 0:
                    continue  # preempted for one before it
                slot = request.slot
                count = min(int(left[slot]), self._most_of(request, budget, scored))
                if not count:
                    continue
                self.tables.trim(slot, int(self._computed[slot]))
                if not self._make_room(request, int(self._computed[slot]) + count, plan):
                    continue
            else:
                break
            # Who was preempted in this step does not come back in it.
            admitting = admitting and not plan.preempted
            slot = request.slot
            self._register(slot, int(self._computed[slot]) + count)
            chunks.append((slot, count))
            self._chosen.add(request)
            if not request.steered:  # beams of a search keep one rank, lest searches wait for each other for ever
                self.policy.served(request, count)
            budget -= count
            scored += count if request.prompt_logprobs is not None else 0
        return chunks

    def _most_of(self, request: Request, budget: int, scored: int) -> int:
        """Tokens that a chunk of the request may have."""
        return budget if request.prompt_logprobs is None else min(budget, _MOST_SCORED - scored)

    def _spare(self) -> int:
        """Free blocks beyond what the running requests need for their tokens and the next one each."""
        wanted = -(-(self._length + 1) // self.tables.block_size) - self.tables.lengths
        wanted = np.where(self._limit > 0, np.maximum(wanted, 0), 0)
        missing = sum(
            int((wanted if most is None else np.minimum(wanted, most)).sum()) for most in self._blocks_at_most
        )
        return self.tables.pool.num_free - missing

    def _admit(self, request: Request, budget: int, spare: int, plan: StepPlan) -> tuple[int, int] | None:
        """Start a waiting request if the cache has room for all of it, what it finds there not counted twice.

        A prompt that is computed faster whole, and that a step could do whole, is not begun with what is left of one.
        Returns the spare blocks left and the tokens of its first chunk.
        """
        tables = self.tables
        request.hash_blocks(tables.block_size)
        num_tokens = len(request.token_ids)
        while True:
            cached = self.prefix_cache.match(request.block_hashes, (num_tokens - 1) // tables.block_size)
            whole = request.prompt_logprobs is None and self._prefers_whole(num_tokens)
            if budget < num_tokens <= self._most and not cached and whole:
                return None
            held = self.prefix_cache.num_held(request.block_hashes, cached)
            total = min(num_tokens + 1, request.max_total_tokens)
            needed = blocks_needed(tables.groups, total, tables.block_size, self.max_num_batched_tokens) - held
            if tables.num_free_slots and needed <= spare:
                break
            if tables.pool.num_retired or not self._displace(request, needed - spare, plan):
                return None
            spare = self._spare()
        self.waiting.remove(request)
        slot = tables.take_slot()
        self.prefix_cache.adopt(slot, request.block_hashes, cached)
        start = cached * tables.block_size
        if request.num_cached_tokens is None:
            request.num_cached_tokens = start
            self.num_cached_tokens += start
            self.num_queried_tokens += num_tokens
        count = min(num_tokens - start, budget)
        self._occupy(request, slot, start)
        self._drop_swapped(request)
        grown = tables.grow(slot, start + count)
        assert grown, "admission counted the blocks wrong"
        plan.admitted.append(request)
        return spare - needed, count

    def _displace(self, waiting: Request, missing: int, plan: StepPlan) -> bool:
        """Preempt one request whose room a waiting one, which lacks `missing` blocks, may have; nobody in vain.

        The policy says whose. Beams that wait for others of their search, which may be in the queue, also make room
        for whoever ranks before them: else searches could hold what the others need, for ever.
        """
        idle = set(np.flatnonzero(self._steered & (self._length == self._computed)).tolist())
        if not idle and not self._displaces:
            return False
        victims = [
            request
            for request in self.running
            if request not in self._chosen
            and request.rank > waiting.rank
            and (request.slot in idle or self.policy.displaces(waiting, request))
        ]
        room = sum(int(self.tables.lengths[request.slot]) for request in victims) * len(self.tables.groups)
        if not victims or room < missing:
            return False
        self._preempt(self.preemption.victim(victims), plan)
        return True

    def _make_room(self, request: Request, num_tokens: int, plan: StepPlan) -> bool:
        """Grow the request's table, preempting those that rank below it; False if it has to wait for a later step.

        The request that ranks first never has to: it gets the blocks of all others.
        """
        while not self.tables.grow(request.slot, num_tokens):
            candidates = [other for other in self.running if other.rank > request.rank and other not in self._chosen]
            if self.tables.pool.num_retired or not candidates:
                return False
            self._preempt(self.preemption.victim(candidates), plan)
        return True

    def _preempt(self, request: Request, plan: StepPlan, keep: bool = True) -> None:
        slot = request.slot
        if keep:
            self._register(slot, int(self._computed[slot]))
            if self.host is not None and self.preemption.swaps(int(self._computed[slot]), self.costs):
                request.swapped = self.prefix_cache.store(slot, request.block_hashes)
                self.num_swapped += bool(request.swapped)
        self._lost.add(slot)
        self._vacate(request)
        request.num_preemptions += 1
        self.num_preempted += 1
        self.waiting.add(request)
        plan.preempted.append(request)

    def _steps_ahead(self, slots: npt.NDArray[np.int64], most: int) -> int:
        """How many times over these decodes can run before one ends or lacks a block; takes the blocks."""
        if self._steered[slots].any():
            return 1
        steps = min(most, int((self._limit[slots] - self._length[slots]).min()))
        tables = self.tables
        while steps > 1:
            wanted = -(-(self._computed[slots] + steps) // tables.block_size) - tables.lengths[slots]
            if int(wanted.sum()) * len(tables.groups) <= tables.pool.num_free:
                for slot in slots[wanted > 0].tolist():
                    self._register(slot, int(self._computed[slot]))
                    tables.grow(slot, int(self._computed[slot]) + steps)
                break
            steps //= 2
        return max(1, steps)

    def _complete(self, plan: StepPlan, decodes: npt.NDArray[np.int64], chunks: list[tuple[int, int]]) -> None:
        """Fill in the rows, and count them as done."""
        if chunks:
            chunks.sort(key=lambda chunk: chunk[1] > 1)
            slots, counts = np.array(chunks, dtype=np.int64).T
            plan.slots = np.concatenate([decodes, slots])
            plan.counts = np.concatenate([np.ones(len(decodes), dtype=np.int64), counts])
            if counts[0] == 1:  # single tokens first, by slot, so that equal batches look alike
                singles = int((plan.counts == 1).sum())
                plan.slots[:singles].sort()
        else:
            plan.slots, plan.counts = decodes, np.ones(len(decodes), dtype=np.int64)
        plan.starts = self._computed[plan.slots]
        self._computed[plan.slots] += plan.counts * plan.num_steps
        plan.samples = plan.starts + plan.counts == self._length[plan.slots]
        sampled = plan.slots[plan.samples]
        plan.sampling = list(map(self._at, sampled.tolist()))
        self._length[sampled] += np.where(self._steered[sampled], 0, plan.num_steps)
        plan.scoring = [
            (row, request)
            for row, slot in (enumerate(plan.slots.tolist()) if chunks else ())
            if (request := self._at(slot)).prompt_logprobs is not None
            and plan.starts[row] < request.num_prompt_tokens - 1
        ]
        plan.loads, self._loads = [request for request in self._loads if request.slot >= 0], []
        plan.moves.clears = self.tables.pool.take_to_clear()
        plan.moves.copies, self._copies = self._copies, []
        if self.host is not None:
            plan.moves.stores, plan.moves.fetches = self.host.take()

    # ---- slots

    def _at(self, slot: int) -> Request:
        request = self._requests[slot]
        assert request is not None
        return request

    def _register(self, slot: int, num_tokens: int) -> None:
        """Let the blocks that the first `num_tokens` fill be found, as far as their tokens are known."""
        request = self._at(slot)
        request.hash_blocks(self.tables.block_size)
        self.prefix_cache.register(slot, request.block_hashes, num_tokens // self.tables.block_size)

    def _occupy(self, request: Request, slot: int, computed: int) -> None:
        request.slot, request.status = slot, RequestStatus.RUNNING
        self._requests[slot] = request
        self._num_running += 1
        self._length[slot], self._computed[slot] = len(request.token_ids), computed
        self._limit[slot], self._steered[slot] = request.max_total_tokens, request.steered
        self._loads.append(request)
        self.policy.started(request)

    def _vacate(self, request: Request) -> None:
        """Take the slot away; full blocks can still be found."""
        slot = request.slot
        self._register(slot, int(self._computed[slot]))
        self.tables.release(slot)
        self.prefix_cache.released(slot)
        self._requests[slot] = None
        self._num_running -= 1
        self._length[slot] = self._computed[slot] = self._limit[slot] = 0
        self._steered[slot] = False
        request.slot, request.status = -1, RequestStatus.WAITING
        self.policy.stopped(request)

    def _evicted(self, block: int, key: bytes) -> None:
        """A cached block is handed out for other content: a second chance in the host tier, if that is the cheaper."""
        assert self.host is not None
        if self.preemption.swaps(self.tables.block_size, self.costs):
            self.host.keep_evicted(block, key)

    def _drop_swapped(self, request: Request) -> None:
        """Let go of the blocks held in the host tier; they stay there until others need the room."""
        if self.host is not None and request.swapped:
            self.host.pool.release(reversed(request.swapped))
            request.swapped = []


def _rank(request: Request) -> tuple[object, int]:
    return request.rank
