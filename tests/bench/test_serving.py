"""The serving benchmark on a tiny model and a real tritonserver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from triton_server_model.bench import Point, Timing, _point
from triton_server_model.top import Totals


def test_streams_through_a_server(tiny_llama_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "serving.json"
    command = [str(Path(sys.executable).parent / "paged-backend"), "bench", "serving", "--model", str(tiny_llama_dir)]
    command += ["--dtype", "float32", "--device", "cpu", "--set", "num_blocks=256", "--output", str(output)]
    command += ["--streams", "1", "--streams", "6", "--prompt-tokens", "20", "--output-tokens", "30", "--repeat", "2"]
    wide = os.environ | {"COLUMNS": "200"}  # however long the figures are
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=wide)
    assert done.returncode == 0, done.stderr
    columns = ("Triton", "tok/s", "share", "TTFT ms", "queue", "prefill")
    assert all(column in done.stdout for column in columns), done.stdout

    told = json.loads(output.read_text())
    assert (told["model"], told["prompt_tokens"], told["output_tokens"]) == (tiny_llama_dir.name, 20, 30)
    assert told["settings"] == {"dtype": "float32", "device": "cpu", "num_blocks": 256}
    assert told["machine"]["packages"].keys() >= {"paged-backend", "torch"}
    assert str(tiny_llama_dir.parent) not in json.dumps(told)  # a result that ships names no folder of this machine
    assert [point["streams"] for point in told["points"]] == [1, 6]
    for point in told["points"]:
        assert point["tokens_per_second"] * point["seconds"] == pytest.approx(30 * point["streams"], rel=0.01)
        assert 0 < point["share"] < 2
        assert 0 < point["ttft_p50_ms"] <= point["ttft_p99_ms"] < 1e3 * point["seconds"]
        assert 0 < point["prefill_ms"] < point["queue_ms"] + point["prefill_ms"] < 1e3 * point["seconds"]


def test_cancel(tiny_llama_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "cancel.json"
    command = [str(Path(sys.executable).parent / "paged-backend"), "bench", "cancel", "--model", str(tiny_llama_dir)]
    command += ["--dtype", "float32", "--device", "cpu", "--set", "num_blocks=256", "--output", str(output)]
    done = subprocess.run([*command, "--repeat", "3"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(output.read_text())
    assert len(told["milliseconds"]) == 3
    assert 0 < max(told["milliseconds"]) < 2000, "a request that was not cancelled runs longer"
    assert "median" in done.stdout


def test_figures_of_a_point() -> None:
    timings = [Timing(sent=10.0, first=11.0, last=13.0, responses=3, tokens=5)] * 3
    timings.append(Timing(sent=10.5, first=13.5, last=15.0, responses=4, tokens=5))
    slower = [replace(timing, last=timing.last + 9) for timing in timings]
    faster = [replace(timing, last=timing.last - 1) for timing in timings]
    told = {"queue_seconds_sum": 1.0, "prefill_seconds_sum": 2.0}
    counts = dict.fromkeys(("queue_seconds_count", "prefill_seconds_count"), 4.0)
    point = _point([slower, timings, faster], Totals(told | counts), engine_rates=[99.0, 1.0, 8.0, 12.0])
    share = 5.0 / 10  # of the faster run: the others are 4.0 / 4.5 and 1.4 / 50
    assert point == Point(4, 5.0, 4.0, 8.0, 1000.0, pytest.approx(2940.0), 250.0, 500.0, 500.0, 20 / 13, share)
