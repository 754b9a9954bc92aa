"""Which layers share tables, and how much of a request each group keeps."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_backend.kv_cache.groups import KVGroup, blocks_needed, group_layers


@dataclass(frozen=True)
class Layer:
    window: int | None = None
    chunk: int | None = None
    num_kv_heads: int = 2
    key_dim: int = 8
    value_dim: int = 8


def sees(group: KVGroup, query: int, token: int) -> bool:
    """Causal attention, written out."""
    if token > query:
        return False
    if group.window is not None:
        return query - token < group.window
    return group.chunk is None or token // group.chunk == query // group.chunk


def groups_of(layers: list[Layer]) -> list[tuple[tuple[int, ...], int | None, int | None]]:
    return [(group.layers, group.window, group.chunk) for group in group_layers(layers)]


def test_a_uniform_model_is_one_group() -> None:
    assert groups_of([Layer()] * 30) == [(tuple(range(30)), None, None)]
    assert groups_of([Layer(window=4096)] * 32) == [(tuple(range(32)), 4096, None)], "Mistral"
    assert groups_of([Layer()]) == [((0,), None, None)]


def test_gemma2_alternates() -> None:
    layers = [Layer(window=4096 if i % 2 == 0 else None) for i in range(26)]
    assert groups_of(layers) == [(tuple(range(0, 26, 2)), 4096, None), (tuple(range(1, 26, 2)), None, None)]


def test_gemma3_has_five_local_layers_for_each_global_one() -> None:
    layers = [Layer(window=None if i % 6 == 5 else 512) for i in range(26)]
    local = [i for i in range(26) if i % 6 != 5]
    assert len(local) == 22
    groups = groups_of(layers)
    assert [group[0] for group in groups if group[1] == 512] == [tuple(local[i : i + 4]) for i in range(0, 22, 4)]
    assert [group for group in groups if group[1] is None] == [((5, 11, 17, 23), None, None)]
    assert len(groups) == 7


def test_gpt_oss_and_llama4() -> None:
    gpt_oss = [Layer(window=128 if i % 2 == 0 else None) for i in range(24)]
    assert [(len(group[0]), group[1]) for group in groups_of(gpt_oss)] == [(12, 128), (12, None)]
    llama4 = [Layer(chunk=None if i % 4 == 3 else 8192) for i in range(48)]
    assert [(len(group[0]), group[2]) for group in groups_of(llama4)] == [(12, 8192)] * 3 + [(12, None)]


def test_two_windows_are_two_kinds() -> None:
    layers = [Layer(window=4), Layer(window=8), Layer(window=4), Layer(chunk=4)]
    assert groups_of(layers) == [
        ((0,), 4, None),
        ((2,), 4, None),
        ((1,), 8, None),
        ((3,), None, 4),
    ]


@pytest.mark.parametrize("other", [{"num_kv_heads": 1}, {"key_dim": 16}, {"value_dim": 16}])
def test_kinds_of_different_shape_become_one_group_that_keeps_all(other: dict[str, int]) -> None:
    assert groups_of([Layer(window=4), Layer(**other), Layer(window=4)]) == [((0, 1, 2), None, None)]
    one_kind = [Layer(window=4), Layer(window=4, **other)]
    assert groups_of(one_kind) == [((0, 1), 4, None)], "one group needs no equal shapes, and keeps its window"


@settings(max_examples=150, deadline=None)
@given(st.lists(st.builds(Layer, window=st.sampled_from([None, 4, 8]), chunk=st.just(None)), min_size=1, max_size=30))
def test_every_layer_is_in_one_group_of_its_kind(layers: list[Layer]) -> None:
    groups = group_layers(layers)
    assert sorted(i for group in groups for i in group.layers) == list(range(len(layers)))
    kinds = [sum(layer.window == window for layer in layers) for window in {layer.window for layer in layers}]
    for group in groups:
        assert list(group.layers) == sorted(group.layers)
        assert {layers[i].window for i in group.layers} == {group.window}
        assert 0 < len(group.layers) <= min(kinds)
        assert group.keeps_all == (group.window is None)
    assert len(groups) == sum(-(-count // min(kinds)) for count in kinds), "no more than must be"


GROUPS = st.one_of(
    st.just(KVGroup()),
    st.builds(KVGroup, window=st.integers(1, 12)),
    st.builds(KVGroup, chunk=st.integers(1, 12)),
)


@settings(max_examples=200, deadline=None)
@given(group=GROUPS, position=st.integers(0, 40))
def test_first_needed_is_what_this_query_or_a_later_one_sees(group: KVGroup, position: int) -> None:
    seen = [
        token
        for token in range(position + 1)
        if any(sees(group, query, token) for query in range(position, position + 30))
    ]
    assert group.first_needed(position) == seen[0]
    assert group.keeps_all == (group.window is None and group.chunk is None)
    assert KVGroup().first_needed(position) == 0


def most_held(group: KVGroup, block_size: int, steps: list[int]) -> int:
    """The most blocks held while steps of so many tokens are computed, giving back what is not seen any more."""
    held: set[int] = set()
    at = most = 0
    for count in steps:
        needed = {
            token // block_size for token in range(at) if any(sees(group, query, token) for query in range(at, at + 30))
        }
        held = held & needed | {token // block_size for token in range(at, at + count)}
        most = max(most, len(held))
        at += count
    return most


@settings(max_examples=200, deadline=None)
@given(data=st.data(), group=GROUPS, block_size=st.integers(1, 6), step_tokens=st.integers(1, 8))
def test_no_request_holds_more_than_most_blocks(
    data: st.DataObject, group: KVGroup, block_size: int, step_tokens: int
) -> None:
    steps = data.draw(st.lists(st.integers(1, step_tokens), max_size=20))
    held = most_held(group, block_size, steps)
    limit = group.most_blocks(block_size, step_tokens)
    assert (limit is None) == group.keeps_all
    assert limit is None or held <= limit
    assert held <= blocks_needed([group], sum(steps), block_size, step_tokens)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("span", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("step_tokens", [1, 2, 5, 8])
def test_most_blocks_is_hardly_more_than_is_held(block_size: int, span: int, step_tokens: int) -> None:
    group = KVGroup(window=span)
    limit = group.most_blocks(block_size, step_tokens)
    held = max(most_held(group, block_size, [1] * start + [step_tokens] * 12) for start in range(block_size))
    assert limit is not None
    assert held <= limit <= held + 2
    assert KVGroup(chunk=span).most_blocks(block_size, step_tokens) == limit


def test_blocks_needed_adds_up_the_groups() -> None:
    groups = [KVGroup(), KVGroup(window=6), KVGroup(chunk=8)]
    window, chunk = (group.most_blocks(4, 10) for group in groups[1:])
    assert (window, chunk) == (5, 6)
    assert blocks_needed(groups, 0, 4, 10) == 0
    assert blocks_needed(groups, 1, 4, 10) == 3
    assert blocks_needed(groups, 9, 4, 10) == 9, "too short for a window to matter"
    assert blocks_needed(groups, 21, 4, 10) == 6 + 5 + 6
    assert blocks_needed(groups, 4000, 4, 10) == 1000 + 5 + 6
