"""Matching against a reference that tries every length, and sharing under pressure with contents watched."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_backend.kv_cache import hashing
from paged_backend.kv_cache.block_pool import BlockPool
from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.kv_cache.groups import KVGroup
from paged_backend.kv_cache.host_tier import HostTier
from paged_backend.kv_cache.prefix_cache import PrefixCache

FULL = KVGroup()
GROUPS = [
    (FULL,),
    (FULL, FULL),
    (KVGroup(window=5),),
    (KVGroup(window=1), FULL),
    (KVGroup(chunk=8),),
    (KVGroup(chunk=6),),
    (FULL, KVGroup(window=6)),
    (KVGroup(window=9), FULL, KVGroup(chunk=8)),
    (KVGroup(window=9), KVGroup(chunk=12), KVGroup(window=4)),
]


def sees(group: KVGroup, query: int, token: int) -> bool:
    """Causal attention, written out."""
    if token > query:
        return False
    if group.window is not None:
        return query - token < group.window
    return group.chunk is None or token // group.chunk == query // group.chunk


class World:
    """A prefix cache in both tiers, and what each block holds: (chain, group, index)."""

    def __init__(
        self, groups: tuple[KVGroup, ...], *, block_size: int = 4, num_blocks: int = 200, host_blocks: int = 100
    ) -> None:
        self.groups, self.size = groups, block_size
        self.host = HostTier(host_blocks) if host_blocks else None
        self.pool = BlockPool(num_blocks, on_evict=self.host.keep_evicted if self.host else None)
        self.tables = BlockTables(
            self.pool, block_size=block_size, num_slots=8, max_model_len=40 * block_size, groups=groups
        )
        self.cache = PrefixCache(self.tables, self.host)
        self.device: dict[int, tuple[int, int, int]] = {}
        self.memory: dict[int, tuple[int, int, int]] = {}

    def hashes(self, chain: int, length: int) -> list[bytes]:
        hashes: list[bytes] = []
        hashing.extend(hashes, hashing.root(str(chain)), list(range(length * self.size)), self.size)
        return hashes

    def needed(self, index: int, length: int) -> list[int]:
        """The blocks, of so many, that the token after them sees."""
        query = length * self.size
        return sorted({token // self.size for token in range(query) if sees(self.groups[index], query, token)})

    def move(self) -> None:
        """What the device does, in the order it does it."""
        stores, fetches = self.host.take() if self.host else ([], [])
        for block, host in stores:
            self.memory[host] = self.device[block]
        for host, block in fetches:
            self.device[block] = self.memory[host]

    def fill(self, chain: int, wanted: list[list[bool]]) -> int:
        """A slot that holds, and has registered, some of a chain's blocks: `[group][index]`."""
        slot, length = self.tables.take_slot(), len(wanted[0])
        assert self.tables.grow(slot, length * self.size)
        self.move()
        for index, row in enumerate(wanted):
            for i, there in enumerate(row):
                block = int(self.tables.array[index, slot, i])
                if there:
                    self.device[block] = (chain, index, i)
                else:
                    self.pool.release([block])
                    self.tables.array[index, slot, i] = 0
        self.cache.register(slot, self.hashes(chain, length), length)
        return slot

    def drop(self, slot: int) -> None:
        self.tables.release(slot)
        self.cache.released(slot)


@settings(max_examples=300, deadline=None)
@given(
    groups=st.sampled_from(GROUPS),
    block_size=st.sampled_from([1, 3, 4]),
    length=st.integers(0, 10),
    most=st.integers(0, 10),
    seed=st.integers(0, 2**32),
    missing=st.sampled_from([0.05, 0.2, 0.6]),
    host_blocks=st.sampled_from([0, 100]),
)
def test_match_and_adopt_against_trying_every_length(
    groups: tuple[KVGroup, ...], block_size: int, length: int, most: int, seed: int, missing: float, host_blocks: int
) -> None:
    rng = random.Random(seed)
    world = World(groups, block_size=block_size, host_blocks=host_blocks)
    most = min(most, length)

    def some() -> list[list[bool]]:
        return [[rng.random() > missing for _ in range(length)] for _ in groups]

    on_host = [[False] * length for _ in groups]
    if world.host:
        on_host = some()
        slot = world.fill(0, on_host)
        held = world.cache.store(slot, world.hashes(0, length))
        assert len(held) == sum(map(sum, on_host))
        world.host.pool.release(reversed(held))
        world.drop(slot)
        world.pool.reset()
        world.move()
    on_device = some()
    slot = world.fill(0, on_device)
    holding = rng.random() < 0.5
    if not holding:
        world.drop(slot)

    hashes = world.hashes(0, length)
    fitting = [
        end
        for end in range(most + 1)
        if all(on_device[g][i] or on_host[g][i] for g in range(len(groups)) for i in world.needed(g, end))
    ]
    found = world.cache.match(hashes, most)
    assert found == max(fitting)
    needed = [(g, i) for g in range(len(groups)) for i in world.needed(g, found)]
    there = {(g, i) for g, i in needed if on_device[g][i]}
    assert world.cache.num_held(hashes, found) == (len(there) if holding else 0)

    new, free = world.tables.take_slot(), world.pool.num_free
    device = dict(world.device)
    world.cache.adopt(new, hashes, found)
    assert world.pool.num_free == free - len(needed) + (len(there) if holding else 0)
    row = world.tables.array[:, new]
    assert world.tables.lengths[new] == found
    assert {(g, i) for g, i in zip(*(at.tolist() for at in np.nonzero(row)), strict=True)} == set(needed)
    assert all(device[int(row[g, i])] == (0, g, i) for g, i in there), "shared, not copied"
    world.move()
    assert all(world.device[int(row[g, i])] == (0, g, i) for g, i in needed)
    assert (world.host.num_fetched if world.host else 0) == len(needed) - len(there)
    world.tables.check()
    assert world.cache.match(hashes, found) == found
    assert world.cache.num_held(hashes, found) == len(needed), "what was fetched can be found on the device"
    world.tables.trim(new, found * block_size)
    assert np.count_nonzero(world.tables.array[:, new]) == len(needed), "it adopted nothing that is not needed"


@settings(max_examples=100, deadline=None)
@given(
    groups=st.sampled_from(GROUPS),
    num_blocks=st.integers(6, 30),
    host_blocks=st.integers(0, 12),
    seed=st.integers(0, 2**32),
)
def test_contents_stay_right_under_pressure(
    groups: tuple[KVGroup, ...], num_blocks: int, host_blocks: int, seed: int
) -> None:
    """Requests come and go in pools too small for them: each block that is found holds what its key says."""
    rng = random.Random(seed)
    world = World(groups, num_blocks=num_blocks, host_blocks=host_blocks)
    slots: dict[int, tuple[int, list[bytes]]] = {}
    swapped: list[list[int]] = []
    for _ in range(40):
        action = rng.random()
        if action < 0.5 and world.tables.num_free_slots:  # admit, several before the device moves anything
            chain, length = rng.randrange(4), rng.randint(1, 5)
            hashes = world.hashes(chain, length)
            found = world.cache.match(hashes, length)
            held = world.cache.num_held(hashes, found)
            shared = sum(len(world.needed(g, found)) for g in range(len(groups)))
            if shared - held + (length - found) * len(groups) > world.pool.num_free:
                continue
            slot = world.tables.take_slot()
            world.cache.adopt(slot, hashes, found)
            assert world.tables.grow(slot, length * world.size), "the room was counted wrong"
            world.move()
            for g in range(len(groups)):
                for i in world.needed(g, found):
                    assert world.device[int(world.tables.array[g, slot, i])] == (chain, g, i)
                for i in range(found, length):
                    world.device[int(world.tables.array[g, slot, i])] = (chain, g, i)
            world.cache.register(slot, hashes, length)
            slots[slot] = (chain, hashes)
        elif action < 0.8 and slots:
            slot = rng.choice(list(slots))
            _, hashes = slots.pop(slot)
            if world.host and rng.random() < 0.5:
                swapped.append(world.cache.store(slot, hashes))
                assert all(world.host.pool.holders(host) for host in swapped[-1])
            world.drop(slot)
        elif action < 0.9 and swapped and world.host:
            world.host.pool.release(reversed(swapped.pop(rng.randrange(len(swapped)))))
        elif action < 0.92:
            world.cache.reset()
        world.tables.check()
        if world.host:
            world.host.pool.check()


def filled(groups: tuple[KVGroup, ...], length: int, **sizes: int) -> tuple[World, int, list[bytes]]:
    world = World(groups, **sizes)
    return world, world.fill(0, [[True] * length for _ in groups]), world.hashes(0, length)


def test_groups_of_a_block_do_not_find_each_other() -> None:
    world = World((FULL, FULL))
    world.fill(0, [[True], [False]])
    assert world.cache.match(world.hashes(0, 1), 1) == 0


def test_register_goes_on_where_it_stopped_and_only_as_far_as_hashes_are_known() -> None:
    world = World((FULL, KVGroup(window=5)))
    slot, hashes = world.tables.take_slot(), world.hashes(0, 4)
    world.tables.grow(slot, 16)
    world.cache.register(slot, hashes[:1], 3)
    assert world.cache.match(hashes, 4) == 1
    world.cache.register(slot, hashes, 2)
    assert world.cache.match(hashes, 4) == 2
    world.cache.register(slot, hashes, 1)
    assert world.cache.match(hashes, 4) == 2
    assert len(world.cache.store(slot, hashes)) == 4, "what is registered stays so"
    world.tables.trim(slot, 16)
    world.cache.register(slot, hashes, 4)
    assert world.cache.match(hashes, 4) == 4
    assert world.pool.find(hashes[2]) == world.tables.array[0, slot, 2]
    world.drop(slot)
    other = world.tables.take_slot()
    world.tables.grow(other, 16)
    more = world.hashes(1, 4)
    world.cache.register(other, more, 4)
    assert world.cache.match(more, 4) == 4, "a slot taken again begins anew"


def test_an_adopted_prefix_is_not_registered_again_and_a_fork_goes_on_where_its_source_is() -> None:
    world, slot, hashes = filled((FULL,), 3)
    world.drop(slot)
    slot, target = world.tables.take_slot(), world.tables.take_slot()
    world.cache.adopt(slot, hashes, 2)
    assert world.cache.store(slot, hashes) != []
    assert world.host is not None
    assert world.host.pool.num_used == 2, "what was adopted counts as registered"
    world.tables.grow(slot, 11)
    copies = world.tables.fork(slot, target, 11)
    assert copies is not None
    assert len(copies) == 1
    world.cache.forked(slot, target)
    held = world.cache.store(target, hashes)
    assert len(held) == 2, "the partial block is not known by any hash"
    world.pool.reset()
    longer = world.hashes(0, 4)
    world.cache.register(target, longer, 3)
    assert [world.pool.find(key) for key in longer[:3]] == [0, 0, world.tables.array[0, target, 2]]


def test_a_shorter_fork_counts_only_its_own_blocks_as_registered() -> None:
    world, slot, hashes = filled((FULL,), 3)
    target = world.tables.take_slot()
    world.tables.fork(slot, target, 4)
    world.cache.forked(slot, target)
    assert len(world.cache.store(target, hashes)) == 1
    world.tables.grow(target, 8)
    other = [hashes[0], *world.hashes(1, 2)[1:]]
    world.cache.register(target, other, 2)
    assert world.cache.match(other, 2) == 2


def test_store_keeps_whole_beginnings_and_stops_where_the_host_is_full() -> None:
    world, slot, hashes = filled((FULL, FULL), 4, host_blocks=5)
    held = world.cache.store(slot, hashes)
    assert world.host is not None
    assert len(held) == len(set(held)) == 5
    assert world.host.pool.num_free == 0
    world.move()
    assert [world.memory[host] for host in held] == [(0, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (0, 0, 2)]
    again = world.cache.store(slot, hashes)
    assert again == held, "shared with the first"
    world.host.pool.release(reversed(held))
    assert world.host.pool.num_free == 0, "the second holds them still"
    world.host.pool.release(reversed(again))
    assert world.host.pool.num_free == 5


def test_store_takes_nothing_after_the_first_block_that_has_no_room() -> None:
    world, slot, hashes = filled((FULL,), 4, host_blocks=2)
    assert world.host is not None
    later = world.host.store(int(world.tables.array[0, slot, 3]), hashes[3])
    held = world.cache.store(slot, hashes)
    assert held == [world.host.pool.find(hashes[0])]
    assert world.host.pool.holders(later) == 1


def test_store_skips_what_the_window_gave_back() -> None:
    world, slot, hashes = filled((KVGroup(window=5), FULL), 4)
    world.tables.trim(slot, 16)
    held = world.cache.store(slot, hashes)
    world.move()
    assert [world.memory[host][1:] for host in held] == [(1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]


def test_without_a_host_tier_nothing_is_stored_and_reset_works() -> None:
    world, slot, hashes = filled((FULL,), 3, host_blocks=0)
    assert world.cache.store(slot, hashes) == []
    world.cache.reset()
    assert world.cache.match(hashes, 3) == 0


def test_reset_forgets_both_tiers() -> None:
    world, slot, hashes = filled((FULL,), 3)
    held = world.cache.store(slot, hashes)
    world.move()
    world.pool.reset()
    assert world.cache.match(hashes, 3) == 3, "in the host tier"
    world.cache.reset()
    assert world.cache.match(hashes, 3) == 0
    assert world.host is not None
    world.host.pool.release(held)
    assert world.host.pool.num_cached == 0
    world.drop(slot)
    assert world.pool.num_cached == 0


def test_a_prefix_loses_its_end_first() -> None:
    world, slot, hashes = filled((FULL, FULL), 4, num_blocks=10, host_blocks=0)
    world.drop(slot)
    matches = []
    for _ in range(5):
        world.pool.allocate(2)
        matches.append(world.cache.match(hashes, 4))
    assert matches == [4, 3, 2, 1, 0]


def test_a_retired_block_is_found_and_shared_while_its_step_is_in_flight() -> None:
    world, slot, hashes = filled((FULL,), 3, num_blocks=3, host_blocks=0)
    world.tables.plan_step()
    world.drop(slot)
    assert world.pool.num_free == 0
    assert world.cache.match(hashes, 3) == 3
    new = world.tables.take_slot()
    world.cache.adopt(new, hashes, 3)
    world.tables.end_step()
    assert world.pool.num_free == 0
    world.tables.check()


def test_adopt_of_what_no_tier_has_is_an_engine_bug() -> None:
    world = World((FULL,), host_blocks=0)
    with pytest.raises(AssertionError, match="no tier"):
        world.cache.adopt(world.tables.take_slot(), world.hashes(0, 1), 1)
