"""The compiled kernels against the reference, for each set of instructions that this machine has."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from paged_kernels.attention import AttentionBatch, LayerSpec, ReferenceAttention
from paged_kernels.cpu import library
from paged_kernels.cpu.attention import CpuAttention
from torch import Tensor

VARIANTS = [name for name, needs in library.VARIANTS.items() if library.features().issuperset(needs)]
CPU = torch.device("cpu")
Rows = list[tuple[int, int, int]]
compiled = pytest.mark.skipif(not VARIANTS, reason="nothing is compiled for this machine's instructions")
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 37},
    "chunk": {"chunk": 50},
    "softcap": {"softcap": 2.0},
    "sinks": {},
    "all": {"window": 20, "softcap": 3.0},
}


class Step:
    """Rows of single tokens, of beginnings and of continued chunks, in random blocks."""

    def __init__(self, spec: LayerSpec, rows: list[tuple[int, int]], block_size: int, dtype: torch.dtype) -> None:
        self.spec, self.block_size, self.dtype = spec, block_size, dtype
        self.rows = sorted(rows, key=lambda row: row[1] - row[0] > 1)
        width = max(-(-length // block_size) for _, length in rows)
        self.num_blocks = width * len(rows)
        self.tables = (torch.randperm(self.num_blocks) + 1).view(len(rows), width).int()
        self.keys = [torch.randn(end, spec.num_kv_heads, spec.key_dim).to(dtype) for _, end in self.rows]
        self.values = [torch.randn(end, spec.num_kv_heads, spec.value_dim).to(dtype) for _, end in self.rows]
        self.queries = torch.randn(sum(end - start for start, end in rows), spec.num_heads, spec.key_dim).to(dtype)

    def slots(self, row: int, positions: range) -> Tensor:
        at = torch.tensor(list(positions), dtype=torch.long)
        return self.tables[row, at // self.block_size].long() * self.block_size + at % self.block_size

    def run(self, backend: ReferenceAttention | CpuAttention, sinks: Tensor | None, *, spoil: bool = False) -> Tensor:
        """With `spoil`, whatever no token was written to is NaN."""
        cache = backend.allocate(self.spec, self.num_blocks, self.block_size, self.dtype, CPU)
        if spoil:
            for stored in cache:
                stored.fill_(float("nan"))
        past = [(row, start) for row, (start, _) in enumerate(self.rows) if start]
        past.sort(key=lambda entry: entry[1] > 1)
        if past:
            nothing = torch.zeros(sum(n for _, n in past), self.spec.num_heads, self.spec.key_dim, dtype=self.dtype)
            written = [(row, 0, n) for row, n in past]
            # The reference needs no rows to write what it is given, and takes long for what nobody looks at.
            rows = [] if isinstance(backend, ReferenceAttention) else written
            self._forward(backend, cache, written, rows, nothing, sinks)
        now = [(row, start, end) for row, (start, end) in enumerate(self.rows)]
        return self._forward(backend, cache, now, now, self.queries, sinks)

    def _forward(
        self, backend: Any, cache: Any, written: Rows, rows: Rows, queries: Tensor, sinks: Tensor | None
    ) -> Tensor:
        batch = AttentionBatch(
            torch.cat([self.slots(row, range(start, end)) for row, start, end in written]),
            self.tables[[row for row, _, _ in rows]],
            [start for _, start, _ in rows],
            [end - start for _, start, end in rows],
            sum(end - start == 1 for _, start, end in rows),
        )
        # Strided as a model hands them over: the transpose of `[heads, tokens, dim]`.
        flat = (
            torch.cat(parts).transpose(0, 1).contiguous().transpose(0, 1)
            for parts in (
                [queries],
                [self.keys[row][start:end] for row, start, end in written],
                [self.values[row][start:end] for row, start, end in written],
            )
        )
        return backend.forward(self.spec, cache, *flat, sinks, batch)


def check(step: Step, sinks: Tensor | None) -> None:
    """Every variant gives what the reference gives, which takes far longer and is asked once."""
    want = step.run(ReferenceAttention(), sinks)
    tolerance = 1e-5 if step.dtype == torch.float32 else 0.02
    for variant in VARIANTS:
        got = step.run(CpuAttention(variant), sinks)
        assert got.is_contiguous()
        told = functools.partial("{}: {}".format, variant)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=told)


@compiled
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_reference(feature: str, dtype: torch.dtype) -> None:
    rng = random.Random(f"{feature}{dtype}")
    torch.manual_seed(rng.randrange(2**31))
    for heads, kv_heads, dims in [(9, 3, (64, 64)), (4, 4, (32, 32)), (8, 1, (16, 48)), (16, 2, (128, 128))]:
        for block_size in (16, 64):
            for count in (1, 6):  # few rows share out their keys between threads
                spec = LayerSpec(heads, kv_heads, *dims, scale=dims[0] ** -0.5, **FEATURES[feature])
                ends = [rng.randint(1, 1400 if count == 1 else 200) for _ in range(count)]
                starts = [rng.choice([end - 1, rng.randrange(end), 0]) for end in ends]
                step = Step(spec, list(zip(starts, ends, strict=True)), block_size, dtype)
                sinks = torch.randn(heads) if feature in ("sinks", "all") else None
                check(step, sinks)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [1, 3, 4, 8, 17])
def test_edges_of_tiles(dtype: torch.dtype, group: int) -> None:
    """Chunks of every length around those of tiles, after contexts of any; windows and local chunks cut tiles."""
    rng = random.Random(f"{dtype}{group}")
    torch.manual_seed(group)
    kv_heads = 1 if group > 8 else 2
    counts = [*range(1, 71), 127, 128, 129, 200, 300]
    rng.shuffle(counts)
    for some in (counts[i : i + 5] for i in range(0, len(counts), 5)):
        dims = rng.choice([(32, 32), (48, 80), (64, 64), (80, 80), (96, 64), (128, 128), (256, 256)])
        spec = LayerSpec(
            kv_heads * group,
            kv_heads,
            *dims,
            scale=dims[0] ** -0.5,
            window=rng.choice([None, None, rng.randint(1, 300)]),
            chunk=rng.choice([None, None, rng.randint(1, 300)]),
            softcap=rng.choice([None, 2.0]),
        )
        rows = [(start, start + count) for count in some for start in [rng.choice([0, rng.randint(1, 600)])]]
        step = Step(spec, rows, rng.choice([16, 32, 128]), dtype)
        check(step, rng.choice([None, torch.randn(kv_heads * group)]))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_contexts_are_cut_into_pieces(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    spec = LayerSpec(4, 2, 32, 32, scale=0.2)
    step = Step(spec, [(3000, 3001), (1700, 1704), (2500, 2540), (10, 11)], 16, dtype)
    check(step, torch.randn(4))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("feature", ["plain", "window", "chunk"])
def test_what_nobody_sees_may_be_nan(variant: str, feature: str) -> None:
    torch.manual_seed(1)
    spec = LayerSpec(4, 2, 32, 32, scale=0.2, **FEATURES[feature])
    step = Step(spec, [(99, 100), (40, 77), (0, 21)], 16, torch.bfloat16)
    assert torch.equal(step.run(CpuAttention(variant), None, spoil=True), step.run(CpuAttention(variant), None))


def test_threads_change_no_bit() -> None:
    torch.manual_seed(2)
    rows = [(30, 90), (0, 200), (149, 150)] * 3 + [(1800, 1801)]
    step = Step(LayerSpec(8, 2, 64, 64, scale=0.125), rows, 16, torch.bfloat16)
    threads, outs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outs.append(step.run(CpuAttention(), None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(
    ("dims", "block_size", "dtype"),
    [((24, 24), 16, torch.float32), ((32, 32), 4, torch.float32), ((32, 32), 16, torch.float16)],
)
def test_the_rest_is_the_references(dims: tuple[int, int], block_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    step = Step(LayerSpec(4, 2, *dims, scale=0.2), [(30, 31), (0, 20)], block_size, dtype)
    assert torch.equal(step.run(CpuAttention(), None), step.run(ReferenceAttention(), None))


def test_without_libraries_it_is_the_reference_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    library.load.cache_clear()
    try:
        step = Step(LayerSpec(4, 2, 32, 32, scale=0.2), [(30, 31), (0, 20)], 16, torch.float32)
        for _ in range(2):
            assert torch.equal(step.run(CpuAttention(), None), step.run(ReferenceAttention(), None))
    finally:
        library.load.cache_clear()
    (record,) = caplog.records
    assert "python -m paged_kernels.cpu.library" in record.getMessage()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(library.CannotBuild, match="no-such-compiler"):
        library.build(tmp_path, ["avx2"])
