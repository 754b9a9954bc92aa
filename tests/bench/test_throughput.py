"""The throughput benchmark on a tiny model."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch

from paged_backend import EngineConfig, InvalidArgument, cli
from paged_backend.bench import workloads
from paged_backend.bench.anchors import GPU, Anchor, anchor
from paged_backend.bench.hf_peer import HfPeer
from paged_backend.bench.machine import describe
from paged_backend.bench.result import Series, ThroughputResult
from paged_backend.bench.shapes import SHAPES
from paged_backend.bench.throughput import OurEngine, compare, measure
from paged_backend.bench.workloads import Workload
from paged_backend.files import write_json
from tests.tiny import build


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

    write_json(tmp_path / "result.json", result.document())
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

        def reset(self) -> None:
            log.append(f"reset {self.name}")

        def run(self, workload: Workload) -> None:
            log.append(f"run {self.name}")

    series = measure([Logged("a"), Logged("b")], workload, repeat=2)
    assert log == ["warm a", "warm b", *["reset a", "run a", "reset b", "run b"] * 2]
    assert [len(one.seconds) for one in series] == [2, 2]


def test_several_workloads_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build("llama", vocab_size=30001).save_pretrained(tmp_path / "model")
    output = tmp_path / "results.json"
    arguments = ["--model", str(tmp_path / "model"), "--workload", "cpu1", "--workload", "bs32", "--repeat", "1"]
    arguments += ["--device", "cpu", "--temperature", "0.8", "--top-p", "0.9", "--output", str(output)]
    monkeypatch.setattr(workloads, "workload", lambda name: Workload(name, [([5, 6], 3)] * (1 + (name == "bs32"))))
    monkeypatch.setattr(sys, "argv", ["paged-backend", "bench", "throughput", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    told = json.loads(output.read_text())
    assert [(each["workload"], each["num_requests"]) for each in told] == [("cpu1", 1), ("bs32", 2)]
    assert {(each["temperature"], each["top_p"], each["anchor"]) for each in told} == {(0.8, 0.9, None)}
    alone = told[0]["series"][0]
    assert alone["median_ms_per_token"] == pytest.approx(alone["seconds"][0] * 1000 / 3, abs=1e-4)
    assert "median_ms_per_token" not in told[1]["series"][0]
    out = capsys.readouterr().out
    assert "temperature 0.8, top_p 0.9" in out
    assert f"({alone['median_ms_per_token']:.2f} ms/token)" in out


def test_random_weights_need_no_files(monkeypatch: pytest.MonkeyPatch, workload: Workload) -> None:
    shape = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    monkeypatch.setitem(SHAPES, "random-1b", shape | {"num_attention_heads": 4, "max_position_embeddings": 256})
    config = EngineConfig(model="random-1b", dtype="bfloat16", device="cpu", num_blocks=64)
    ours = OurEngine(config)
    assert ours.engine.model.dtype == torch.bfloat16
    result = compare(config, workload, [ours], repeat=1)
    assert (result.model, result.anchor) == ("random-1b", None)


def test_anchors() -> None:
    assert anchor("offline256", "random-1b", GPU) == Anchor("vLLM 0.26.0", 25_600, 28_200)
    bs1 = anchor("bs1", "random-8b", GPU)
    assert bs1 is not None
    assert 1000 / bs1.highest == pytest.approx(6.56)
    assert anchor("bs1", "random-8b", "NVIDIA H200") is None
    assert anchor("cpu1", "random-8b", GPU) is None
    assert anchor("bs1", "smollm2-135m-instruct", GPU) is None
    result = result_of([13.0])
    result.anchor = Anchor("other", 20.0, 26.0)
    assert result.document()["series"][0]["ratio_to_anchor"] == 0.5  # type: ignore[index]


def result_of(*rates: list[float]) -> ThroughputResult:
    series = [Series(str(i), {}, 0.0, 100, [100 / rate for rate in each]) for i, each in enumerate(rates)]
    return ThroughputResult("w", 2, 0.0, 1.0, "m", "auto", "cpu", "output tok/s", "now", describe(), None, series)


def test_medians_and_ratios() -> None:
    result = result_of([10.0, 400.0, 50.0], [20.0, 25.0, 1000.0])
    ours, peer = result.series
    assert ours.median_rate == pytest.approx(50)
    assert ours.rates == pytest.approx([10, 400, 50])
    assert (result.ratio(ours), result.ratio(peer)) == (pytest.approx(2), 1)


def test_a_result_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = result_of([1.0])
    write_json(path, result.document())
    before = path.read_text()
    result.series[0].settings["bad"] = object()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, result.document())
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["result.json"]
    assert path.stat().st_mode & 0o777 == 0o644
