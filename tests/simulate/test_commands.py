"""`paged-backend simulate`, end to end in this process."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from paged_backend import cli

PNG = b"\x89PNG\r\n\x1a\n"


def simulate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["paged-backend", "simulate", *arguments])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_a_trace_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival,prompt,output,tenant\n0,100,5,a\n0.5,200,1,b\n1,70000,5,a\n")
    paths = {name: tmp_path / f"out.{name}" for name in ("csv", "png", "json")}
    outputs = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    assert simulate(monkeypatch, "--trace", str(trace), "--set", "max_model_len=4096", *outputs) == 0
    out = capsys.readouterr().out
    assert "requests refused" in out
    assert "a: TTFT" in out
    assert paths["png"].read_bytes().startswith(PNG)
    with paths["csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["finished", "finished", "refused"]
    assert rows[1]["tpot"] == "", "one token has no time between tokens"
    assert float(rows[0]["latency"]) == pytest.approx(float(rows[0]["ttft"]) + 4 * float(rows[0]["tpot"]), abs=1e-5)
    document = json.loads(paths["json"].read_text())
    run = document["runs"][0]
    assert (run["finished"], run["refused"], run["output_tokens"]) == (2, 1, 6)
    assert run["tenants"]["b"]["tpot_seconds"]["p50"] is None
    assert document["settings"]["config"]["max_model_len"] == 4096


def test_reservations_are_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    modes = ["--reserve", "paged", "--reserve", "contiguous-max", "--reserve", "power-of-two"]
    config = ["--set", "num_blocks=1024", "--set", "max_model_len=2048", "--rate", "inf", "--requests", "300"]
    outputs = ["--png", str(tmp_path / "memory.png"), "--json", str(tmp_path / "memory.json")]
    assert simulate(monkeypatch, *modes, *config, *outputs, "--allocator", "first-fit") == 0
    assert "contiguous-max" in capsys.readouterr().out
    assert (tmp_path / "memory.png").read_bytes().startswith(PNG)
    runs = json.loads((tmp_path / "memory.json").read_text())["runs"]
    for run in runs:
        memory = run["memory"]
        parts = ("used", "reserved", "internal_fragmentation", "external_fragmentation_and_others")
        assert sum(memory[part] for part in parts) == pytest.approx(1)
    assert runs[0]["memory"]["waste_of_allocated"] < 0.04 < 0.3 < runs[2]["memory"]["waste_of_allocated"]


def test_policies_are_compared_with_and_without_noise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = ["--noisy-requests", "50", "--noisy-prompt", "4000", "--noisy-at", "2"]
    policies = ["--scheduling-policy", "fcfs", "--scheduling-policy", "fair-share"]
    outputs = [
        *("--png", str(tmp_path / "noise.png"), "--json", str(tmp_path / "noise.json")),
        *("--save-trace", str(tmp_path / "trace.csv")),
    ]
    assert simulate(monkeypatch, "--requests", "100", *noise, *policies, *outputs) == 0
    assert "p99 TTFT of the others" in capsys.readouterr().out
    document = json.loads((tmp_path / "noise.json").read_text())
    labels = [run["label"] for run in document["runs"]]
    assert labels == ["fcfs, without noise", "fcfs", "fair-share, without noise", "fair-share"]
    ratios = document["p99_ttft_of_others_with_noise_to_without"]
    assert ratios["fair-share"] < ratios["fcfs"]
    assert (tmp_path / "noise.png").read_bytes().startswith(PNG)
    assert (tmp_path / "trace.csv").read_text().count("noisy") == 50


def test_shapes_and_measured_steps_from_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = {
        "name": "m",
        "body_params": 1e9,
        "head_params": 1e8,
        "layers": 8,
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 64,
    }
    (tmp_path / "model.json").write_text(json.dumps(model))
    device = {"name": "d", "bytes_per_second": 1e12, "flops_per_second": 1e14, "memory_bytes": 16e9}
    (tmp_path / "device.json").write_text(json.dumps(device))
    (tmp_path / "steps.json").write_text('{"a": 0.01, "b": 1e-5, "c": 0, "d": 0}')
    steps = ["prefill_tokens,decode_rows,kv_tokens,seconds", "100,0,100,0.011", "0,1,101,0.01", "0,2,200,0.01"]
    (tmp_path / "steps.csv").write_text("\n".join([*steps, "500,0,500,0.015", "0,3,900,0.01"]))
    chosen = ["--model", str(tmp_path / "model.json"), "--device", str(tmp_path / "device.json"), "--requests", "20"]
    assert simulate(monkeypatch, *chosen) == 0
    for name in ("steps.json", "steps.csv"):
        output = tmp_path / f"{name}.out"
        assert simulate(monkeypatch, *chosen, "--step-time", str(tmp_path / name), "--json", str(output)) == 0
        assert json.loads(output.read_text())["settings"]["step_time"]["a"] == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--model", "70b"], "model"),
        (["--device", "tpu"], "device"),
        (["--router", "random"], "router"),
        (["--scheduling-policy", "lifo"], "scheduling_policy"),
        (["--reserve", "half"], "reserve"),
        (["--allocator", "slab"], "allocator"),
        (["--replicas", "0"], "replicas"),
        (["--rate", "0"], "rate"),
        (["--burstiness", "0"], "burstiness"),
        (["--set", "num_blocs=3"], "num_blocs"),
        (["--set", "scheduling_policy=fcfs"], "set"),
        (["--set", "attention_backend=triton"], "attention_backend"),
        (["--trace", "nowhere.csv"], "trace"),
        (["--step-time", "nowhere.json"], "step_time"),
        (["--csv", "nowhere/out.csv"], "csv"),
        (["--noisy-requests", "5", "--noisy-at", "-1"], "noisy_at"),
    ],
)
def test_bad_arguments_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], field: str
) -> None:
    assert simulate(monkeypatch, "--requests", "10", *arguments) == 2
    assert f"error: {field}=" in capsys.readouterr().err


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    for option in ("--trace", "--model", "--reserve", "--router", "--noisy-requests", "--json"):
        assert option in out
