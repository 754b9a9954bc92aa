"""The throughput benchmark on a tiny model."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from paged_backend import EngineConfig, InvalidArgument
from paged_backend.bench.hf_peer import HfPeer
from paged_backend.bench.machine import describe
from paged_backend.bench.result import Series, ThroughputResult
from paged_backend.bench.throughput import OurEngine, compare, measure
from paged_backend.bench.workloads import Workload


@pytest.fixture
def workload() -> Workload:
    r = random.Random(0)
    return Workload(
        "small", [([r.randint(3, 100) for _ in range(r.randint(2, 20))], r.randint(1, 9)) for _ in range(5)]
    )


def test_compare_with_transformers(tiny_llama_dir: Path, workload: Workload, tmp_path: Path) -> None:
    config = EngineConfig(model=str(tiny_llama_dir), dtype="float32", num_blocks=64)
    ours = OurEngine(config)
    peer = HfPeer(tiny_llama_dir, "float32", "auto", batch_sizes=[2, 64])
    result = compare(config, workload, [ours, peer], repeat=3)
    assert [series.system for series in result.series] == ["paged-backend", "transformers generate"]
    assert {len(series.seconds) for series in result.series} == {3}
    assert {series.tokens for series in result.series} == {workload.output_tokens}
    assert result.series[1].settings.keys() == {"batch_size", "tried_seconds"}
    assert result.series[1].settings["tried_seconds"].keys() == {"2", "5"}  # type: ignore[attr-defined]
    assert ours.engine.stats().output_tokens == 4 * workload.output_tokens  # the warm-up and three runs

    result.write(tmp_path / "result.json")
    told = json.loads((tmp_path / "result.json").read_text())
    assert (told["model"], told["unit"]) == (tiny_llama_dir.name, "output tok/s")
    assert str(tiny_llama_dir.parent) not in json.dumps(told)  # a result that ships names no folder of this machine
    assert told["series"][0]["settings"] == {"dtype": "float32", "num_blocks": 64}
    assert told["machine"]["packages"].keys() >= {"paged-backend", "torch", "transformers"}


def test_a_workload_the_model_cannot_do_is_refused(tiny_llama_dir: Path) -> None:
    engine = OurEngine(EngineConfig(model=str(tiny_llama_dir), num_blocks=64))
    with pytest.raises(InvalidArgument, match=r"prompt\[1\]=30000: must be a token id in 0\.\."):
        engine.run(Workload("foreign", [([1, 30000], 2)]))
    with pytest.raises(RuntimeError, match="made 12 of 600 tokens"):
        engine.run(Workload("long", [([1] * 500, 600)]))


def test_systems_run_in_turns(workload: Workload) -> None:
    log: list[str] = []

    class Logged:
        load_seconds = 0.0

        def __init__(self, name: str) -> None:
            self.name = name
            self.settings: dict[str, object] = {}

        def warm_up(self, workload: Workload) -> None:
            log.append(f"warm {self.name}")

        def run(self, workload: Workload) -> None:
            log.append(f"run {self.name}")

    series = measure([Logged("a"), Logged("b")], workload, repeat=2)
    assert log == ["warm a", "warm b", "run a", "run b", "run a", "run b"]
    assert [len(one.seconds) for one in series] == [2, 2]


def result_of(*rates: list[float]) -> ThroughputResult:
    series = [Series(str(i), {}, 0.0, 100, [100 / rate for rate in each]) for i, each in enumerate(rates)]
    return ThroughputResult("w", "m", "auto", "cpu", "output tok/s", "now", describe(), series)


def test_medians_and_ratios() -> None:
    result = result_of([10.0, 400.0, 50.0], [20.0, 25.0, 1000.0])
    ours, peer = result.series
    assert ours.median_rate == pytest.approx(50)
    assert ours.rates == pytest.approx([10, 400, 50])
    assert (result.ratio(ours), result.ratio(peer)) == (pytest.approx(2), 1)


def test_a_result_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = result_of([1.0])
    result.write(path)
    before = path.read_text()
    result.series[0].settings["bad"] = object()
    with pytest.raises(TypeError, match="not JSON serializable"):
        result.write(path)
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["result.json"]
    assert path.stat().st_mode & 0o777 == 0o644
