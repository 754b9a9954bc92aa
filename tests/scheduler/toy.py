"""A scheduler on a device made of dictionaries, with a model that is a hash: its next token depends on all before.

Every block holds what a real one would: for each token in it, the hash of the tokens up to there. So a token read
through a wrong, stale, shared or swapped block is seen at once, and the output of a request can be told in advance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from paged_backend.kv_cache import hashing
from paged_backend.kv_cache.block_pool import BlockPool
from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.kv_cache.groups import KVGroup
from paged_backend.kv_cache.host_tier import HostTier
from paged_backend.request import Request, RequestStatus, SamplingParams
from paged_backend.scheduler.plan import StepPlan
from paged_backend.scheduler.policy import SchedulingPolicy
from paged_backend.scheduler.preemption import LowestRanked, PreemptionPolicy
from paged_backend.scheduler.scheduler import Scheduler

VOCAB = 5
START = 17


def expected(prompt: Sequence[int], length: int) -> list[int]:
    """The output of the toy model."""
    tokens, chain = list(prompt), START
    for token in prompt:
        chain = hash((chain, token))
    for _ in range(length):
        tokens.append(chain % VOCAB)
        chain = hash((chain, tokens[-1]))
    return tokens[len(prompt) :]


@dataclass
class Toy:
    """A scheduler, the requests it was given, and the device."""

    num_blocks: int = 20
    block_size: int = 4
    num_slots: int = 4
    budget: int = 16
    prefill: int | None = None
    policy: SchedulingPolicy = field(default_factory=SchedulingPolicy)
    groups: tuple[KVGroup, ...] = (KVGroup(),)
    host_blocks: int = 0
    preemption: PreemptionPolicy = field(default_factory=lambda: LowestRanked(swap=True))
    lag: int = 0
    """Steps that are planned before the first of them ends."""

    def __post_init__(self) -> None:
        self.host = HostTier(self.host_blocks) if self.host_blocks else None
        self.max_len = self.num_blocks // len(self.groups) * self.block_size
        self.tables = BlockTables(
            BlockPool(self.num_blocks),
            block_size=self.block_size,
            num_slots=self.num_slots,
            max_model_len=self.max_len,
            groups=self.groups,
        )
        self.scheduler = Scheduler(
            self.policy,
            self.tables,
            max_num_batched_tokens=self.budget,
            max_prefill_tokens=self.prefill,
            preemption=self.preemption,
            host=self.host,
        )
        self.live: dict[str, Request] = {}
        self.nothing: list[int | None] = [None] * self.block_size
        self.device: dict[int, list[int | None]] = {}
        """What is in each block."""
        self.memory: dict[int, list[int | None]] = {}
        """The same of the host."""
        self.chains: dict[str, list[int]] = {}
        self.computed_tokens = 0
        self.arrivals = self.steps = 0
        self.in_flight = 0

    def add(self, prompt: int | Sequence[int], output: int, salt: str = "", **fields: object) -> Request:
        token_ids = [self.arrivals % VOCAB] * prompt if isinstance(prompt, int) else list(prompt)
        token_ids = token_ids[: self.max_len - 1]
        request = Request(
            request_id=f"r{self.arrivals}",
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            params=SamplingParams(),
            max_total_tokens=min(len(token_ids) + output, self.max_len),
            stop_token_ids=frozenset(),
            seed=0,
            arrival_index=self.arrivals,
            hash_root=hashing.root(salt),
        )
        for name, value in fields.items():
            setattr(request, name, value)
        self.arrivals += 1
        self.live[request.request_id] = request
        self.scheduler.add(request)
        return request

    def abort(self, request: Request) -> None:
        request.end("abort")
        self.scheduler.remove(request)
        del self.live[request.request_id]

    def chain(self, request: Request) -> list[int]:
        """What K and V of each of its tokens stand for. Tokens are only ever added."""
        chain = self.chains.setdefault(request.request_id, [])
        for token in request.token_ids[len(chain) :]:
            chain.append(hash((chain[-1] if chain else START, token)))
        return chain

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.steps += 1
        self.run(plan)
        self.in_flight += 1
        if self.in_flight > self.lag:
            self.scheduler.end_step()
            self.in_flight -= 1
        for request in plan.sampling:
            request.token_ids.append(self.chain(request)[-1] % VOCAB)
            if len(request.token_ids) == request.max_total_tokens:
                request.end("length")
                self.scheduler.remove(request)
                del self.live[request.request_id]
                prompt = request.token_ids[: request.num_prompt_tokens]
                assert request.token_ids[len(prompt) :] == expected(prompt, len(request.token_ids) - len(prompt))
        self.tables.check()
        if self.host is not None:
            self.host.pool.check()
        return plan

    def run(self, plan: StepPlan) -> None:
        """What the device does: move blocks, write all rows, then read what each row's tokens see."""
        self.tables.check()
        for source, target, pairs in (
            (self.device, self.memory, plan.moves.stores),
            ({}, self.device, [(0, block) for block in plan.moves.clears]),
            (self.device, self.device, plan.moves.copies),
            (self.memory, self.device, plan.moves.fetches),
        ):
            for origin, destination in pairs:
                target[destination] = list(source.get(origin, self.nothing))
        assert plan.num_tokens <= self.budget
        assert len(set(plan.slots.tolist())) == len(plan.slots) <= self.num_slots
        assert [count > 1 for count in plan.counts.tolist()] == sorted(count > 1 for count in plan.counts.tolist())
        requests = {request.slot: request for request in self.live.values() if request.slot >= 0}
        assert len(requests) == self.scheduler.num_running
        assert all(request in plan.loads for request in plan.admitted)
        rows = list(zip(plan.slots.tolist(), plan.starts.tolist(), plan.counts.tolist(), strict=True))
        for slot, start, count in rows:
            assert count > 0
            self.computed_tokens += count
            chain = self.chain(requests[slot])
            for at in range(start, start + count):
                for table in self.tables.array[:, slot]:
                    block = int(table[at // self.block_size])
                    assert block > 0, "a token is written nowhere"
                    self.device.setdefault(block, list(self.nothing))[at % self.block_size] = chain[at]
        for slot, start, count in rows:
            chain, end = self.chain(requests[slot]), start + count
            for group, table in zip(self.groups, self.tables.array[:, slot].tolist(), strict=True):
                begin = group.first_needed(start)
                first = begin // self.block_size
                blocks = table[first : -(-end // self.block_size)]
                held = [content for block in blocks for content in self.device.get(block, self.nothing)]
                before = begin - first * self.block_size
                assert held[before : before + end - begin] == chain[begin:end], "a token sees what is not its own"
        for request in self.live.values():
            running = request.status is RequestStatus.RUNNING
            assert running == (request.slot >= 0) == (request not in self.scheduler.waiting)
        if not rows and not self.lag:
            assert not self.live, "a step with work to do did none"

    def drain(self, limit: int = 10_000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.live, "requests were lost or starved"
        while self.in_flight:
            self.scheduler.end_step()
            self.in_flight -= 1
        assert self.tables.pool.num_free == self.num_blocks
        if self.host is not None:
            assert self.host.pool.num_free == self.host_blocks
