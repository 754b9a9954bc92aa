"""The tensors behind the block ids: copies, clears and swaps touch what they should, bit for bit."""

from __future__ import annotations

import pytest
import torch
from paged_kernels.attention import LayerSpec, ReferenceAttention
from torch import Tensor

from paged_backend.kv_cache import swap as swap_module
from paged_backend.kv_cache.groups import KVGroup, group_layers
from paged_backend.kv_cache.storage import KVStorage, block_bytes, stored_layers
from paged_backend.kv_cache.swap import SwapSpace

DTYPES = [torch.float32, torch.bfloat16]
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
NUM_BLOCKS = 7
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def spec(window: int | None = None, key_dim: int = 8, value_dim: int = 8) -> LayerSpec:
    return LayerSpec(num_heads=4, num_kv_heads=2, key_dim=key_dim, value_dim=value_dim, scale=1.0, window=window)


ALTERNATING = [spec(), spec(window=8), spec(), spec(window=8), spec(window=8)]
UNEQUAL = [spec(), spec(key_dim=16, value_dim=4), spec(key_dim=2)]


def storage_of(specs: list[LayerSpec], dtype: torch.dtype = torch.float32) -> KVStorage:
    return KVStorage(
        ReferenceAttention(),
        specs,
        group_layers(specs),
        num_blocks=NUM_BLOCKS,
        block_size=4,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def bits(tensor: Tensor) -> Tensor:
    """NaN and negative zero compare as they are stored."""
    return tensor.view(INTEGERS[tensor.dtype])


def scramble(storage: KVStorage, seed: int = 0) -> list[Tensor]:
    """Random bits everywhere, NaN among them; a copy of them."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in storage.tensors:
        info = torch.iinfo(INTEGERS[tensor.dtype])
        random = torch.randint(info.min, info.max, tensor.shape, generator=generator)
        bits(tensor).copy_(random.to(INTEGERS[tensor.dtype]))
    return [bits(tensor).clone() for tensor in storage.tensors]


def same(storage: KVStorage, expected: list[Tensor]) -> bool:
    return all(torch.equal(bits(tensor), other) for tensor, other in zip(storage.tensors, expected, strict=True))


def test_the_ith_layers_of_all_groups_share_the_ith_storage() -> None:
    groups = group_layers(ALTERNATING)
    assert [group.layers for group in groups] == [(0, 2), (1, 3), (4,)]
    assert stored_layers(groups) == [0, 2]
    storage = storage_of(ALTERNATING)
    assert len(storage.layers) == 5
    assert len(storage.tensors) == 4, "each once"
    first, second = storage.layers[0], storage.layers[2]
    assert [cache is first for cache in storage.layers] == [True, True, False, False, True]
    assert [cache is second for cache in storage.layers] == [False, False, True, True, False]
    assert {tensor.data_ptr() for tensor in storage.tensors} == {t.data_ptr() for t in (*first, *second)}


def test_a_longer_group_after_a_shorter_one_stores_its_own_layers() -> None:
    groups = [KVGroup((3,)), KVGroup((0, 1, 2), window=4)]
    assert stored_layers(groups) == [3, 1, 2]
    storage = KVStorage(
        ReferenceAttention(),
        [spec()] * 4,
        groups,
        num_blocks=2,
        block_size=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert len(storage.tensors) == 6
    assert storage.layers[3] is storage.layers[0]
    assert len({id(cache) for cache in storage.layers}) == 3


def test_unequal_shapes_each_have_their_own_storage() -> None:
    storage = storage_of(UNEQUAL)
    assert [tuple(cache.key.shape) for cache in storage.layers] == [
        (NUM_BLOCKS + 1, 4, 2, 8),
        (NUM_BLOCKS + 1, 4, 2, 16),
        (NUM_BLOCKS + 1, 4, 2, 2),
    ]
    assert [cache.value.shape[3] for cache in storage.layers] == [8, 4, 8]


@dtypes
@pytest.mark.parametrize("specs", [ALTERNATING, UNEQUAL])
def test_a_block_has_the_bytes_it_is_said_to_have_and_starts_as_zeros(
    specs: list[LayerSpec], dtype: torch.dtype
) -> None:
    storage = storage_of(specs, dtype)
    assert all(tensor.shape[0] == NUM_BLOCKS + 1 and not tensor.any() for tensor in storage.tensors)
    each = sum(tensor[0].numel() * tensor.element_size() for tensor in storage.tensors)
    assert block_bytes(specs, group_layers(specs), 4, dtype) == each


@dtypes
@pytest.mark.parametrize("specs", [ALTERNATING, UNEQUAL])
def test_copy_and_clear_touch_only_their_blocks(specs: list[LayerSpec], dtype: torch.dtype) -> None:
    storage = storage_of(specs, dtype)
    expected = scramble(storage)
    storage.copy([(1, 4), (1, 5), (7, 2)])
    for tensor in expected:
        for source, target in ((1, 4), (1, 5), (7, 2)):
            tensor[target] = tensor[source].clone()
    assert same(storage, expected)
    storage.clear([3, 7])
    for tensor in expected:
        tensor[[3, 7]] = 0
    assert same(storage, expected)
    storage.copy([])
    storage.clear([])
    assert same(storage, expected)
    assert storage.indices([3, 1]).dtype == torch.int64


@dtypes
@pytest.mark.parametrize("specs", [ALTERNATING, UNEQUAL])
@pytest.mark.parametrize("staged", [None, 0, 3])
def test_swapped_blocks_come_back_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, specs: list[LayerSpec], dtype: torch.dtype, staged: int | None
) -> None:
    """`staged`: how many blocks one batch takes; 0: the limit is below one block."""
    storage = storage_of(specs, dtype)
    if staged is not None:
        each = block_bytes(specs, group_layers(specs), 4, dtype)
        monkeypatch.setattr(swap_module, "_STAGED_BYTES", staged * each + each // 2)
    space = SwapSpace(storage, 9)
    before = scramble(storage)
    out = [(1, 9), (2, 3), (7, 1), (3, 4), (5, 2), (4, 5), (6, 8)]
    space.store(out)
    assert same(storage, before), "a store only reads"
    expected = scramble(storage, seed=1)
    back = [(9, 2), (3, 1), (1, 5), (4, 7), (2, 6)]
    space.fetch(back)
    came_from = {host: block for block, host in out}
    for tensor, old in zip(expected, before, strict=True):
        for host, block in back:
            tensor[block] = old[came_from[host]]
    assert same(storage, expected)
    space.fetch([(8, 6), (5, 3)])
    for tensor, old in zip(expected, before, strict=True):
        tensor[6], tensor[3] = old[6], old[4]
    assert same(storage, expected), "what was not fetched is kept"
    space.store([])
    space.fetch([])
    assert same(storage, expected)


def test_of_two_stores_to_a_host_block_the_later_stays() -> None:
    """As when a block is evicted from the host in the plan that stored it."""
    storage = storage_of(ALTERNATING)
    space = SwapSpace(storage, 1)
    before = scramble(storage)
    space.store([(2, 1), (3, 1)])
    space.fetch([(1, 7)])
    assert all(torch.equal(bits(now)[7], old[3]) for now, old in zip(storage.tensors, before, strict=True))


@pytest.mark.parametrize("staged", [1, 2, 3, 5])
def test_no_batch_is_larger_than_the_limit(monkeypatch: pytest.MonkeyPatch, staged: int) -> None:
    storage = storage_of(ALTERNATING)
    each = block_bytes(ALTERNATING, group_layers(ALTERNATING), 4, torch.float32)
    monkeypatch.setattr(swap_module, "_STAGED_BYTES", (staged + 1) * each - 1)
    space = SwapSpace(storage, 7)
    batches: list[int] = []
    indices = storage.indices

    def counted(blocks: list[int]) -> Tensor:
        batches.append(len(blocks))
        return indices(blocks)

    monkeypatch.setattr(storage, "indices", counted)
    pairs = [(block, block) for block in range(1, 8)]
    for copy in (space.store, space.fetch):
        batches.clear()
        copy(pairs)
        assert sum(batches) == 7
        assert len(batches) == -(-7 // staged)
        assert max(batches) <= staged


@dtypes
@pytest.mark.parametrize("host_blocks", [0, 1, 4, 40])
def test_measure_leaves_the_device_alone(dtype: torch.dtype, host_blocks: int) -> None:
    storage = storage_of(ALTERNATING, dtype)
    space = SwapSpace(storage, host_blocks)
    before = scramble(storage)
    assert 0 < space.measure() < float("inf")
    assert same(storage, before)
