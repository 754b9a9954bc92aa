"""The time of a start, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from paged_backend import cli


def bench_start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["paged-backend", "bench", "start", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_cold_and_warm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama_dir: Path) -> None:
    output = tmp_path / "start.json"
    assert bench_start(monkeypatch, "--model", str(tiny_llama_dir), "--dtype", "float32", "--output", str(output)) == 0
    starts = json.loads(output.read_text())["starts"]
    assert [start["kind"] for start in starts] == ["cold", "warm"]
    assert all(0 < start["imported"] < start["ready"] < start["first_token"] for start in starts)
    for start in starts:
        assert list(start["stages"]) == ["weights", "model", "cache", "runner"]
        assert sum(start["stages"].values()) == pytest.approx(start["ready"] - start["imported"], abs=0.2)


def test_why_a_start_failed(
    monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = ["--set", "num_blocks=1", "--set", "max_model_len=500"]
    assert bench_start(monkeypatch, "--model", str(tiny_llama_dir), *setting) != 0
    assert "num_blocks" in capsys.readouterr().err
