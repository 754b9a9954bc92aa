"""Hashes name the whole prefix, whatever way they were computed."""

from __future__ import annotations

import hashlib
import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from paged_backend.kv_cache import hashing

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=40)


def straightforward(salt: str, token_ids: list[int], block_size: int) -> list[bytes]:
    """The chain as the documentation tells it."""
    parent = hashlib.blake2b(salt.encode(), digest_size=16, person=b"paged-backend").digest()
    hashes = []
    for at in range(0, len(token_ids) - block_size + 1, block_size):
        block = b"".join(struct.pack("=i", token) for token in token_ids[at : at + block_size])
        parent = hashlib.blake2b(parent + block, digest_size=16).digest()
        hashes.append(parent)
    return hashes


def chain(salt: str, token_ids: list[int], block_size: int) -> list[bytes]:
    hashes: list[bytes] = []
    hashing.extend(hashes, hashing.root(salt), token_ids, block_size)
    return hashes


@settings(max_examples=150, deadline=None)
@given(salt=st.text(max_size=5), token_ids=TOKENS, block_size=st.integers(1, 9))
def test_the_chain_is_blake2b_of_parent_and_tokens(salt: str, token_ids: list[int], block_size: int) -> None:
    hashes = chain(salt, token_ids, block_size)
    assert len(hashes) == len(token_ids) // block_size
    assert hashes == straightforward(salt, token_ids, block_size)


@settings(max_examples=150, deadline=None)
@given(token_ids=TOKENS, block_size=st.integers(1, 9), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_extension_in_any_steps_equals_from_scratch(token_ids: list[int], block_size: int, cuts: list[int]) -> None:
    hashes: list[bytes] = []
    for end in [*sorted(cuts), len(token_ids), 3]:
        hashing.extend(hashes, hashing.root("s"), token_ids[:end], block_size)
    assert hashes == straightforward("s", token_ids, block_size)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), block_size=st.integers(1, 5))
def test_a_changed_token_changes_its_hash_and_all_later_ones(data: st.DataObject, block_size: int) -> None:
    token_ids = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=25))
    at = data.draw(st.integers(0, len(token_ids) - 1))
    changed = [*token_ids[:at], token_ids[at] + 1, *token_ids[at + 1 :]]
    before, after = chain("", token_ids, block_size), chain("", changed, block_size)
    same = [one == other for one, other in zip(before, after, strict=True)]
    assert same == [i < at // block_size for i in range(len(token_ids) // block_size)]


def test_equal_blocks_at_other_places_have_other_hashes() -> None:
    hashes = chain("", [1, 2] * 50, 2)
    assert len(set(hashes)) == 50


def test_block_sizes_and_salts_never_meet() -> None:
    tokens = [7] * 24
    chains = [chain(salt, tokens, 4) for salt in ("", "a", "b", "ab", "é")]
    chains += [[hashing.root(salt)] for salt in ("", "a", "b", "ab", "é")]
    chains += [chain("", tokens, size) for size in (1, 2, 3, 8)]
    together = [one for hashes in chains for one in hashes]
    assert len(set(together)) == len(together)
    assert {len(one) for one in together} == {16}


def test_a_salt_that_spells_out_a_block_does_not_reach_its_hash() -> None:
    spelled = (hashing.root("") + struct.pack("=4i", 1, 2, 3, 4)).decode("latin-1")
    assert hashing.root(spelled) not in chain("", [1, 2, 3, 4], 4)
    plain = hashlib.blake2b(b"salt", digest_size=16).digest()
    assert hashing.root("salt") != plain
