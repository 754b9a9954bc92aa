"""Steps by threads, rows and context."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from paged_backend import cli
from paged_backend.bench.scaling import MOST_TOKENS, grid


def bench_scaling(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["paged-backend", "bench", "scaling", *arguments])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_points(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, plot = tmp_path / "scaling.json", tmp_path / "scaling.png"
    arguments = ["--model", str(tiny_llama_dir), "--threads", "1", "--rows", "3", "--rows", "1"]
    arguments += ["--context", "200", "--context", "100", "--output", str(output), "--plot", str(plot)]
    before = torch.get_num_threads()
    assert bench_scaling(monkeypatch, *arguments) == 0
    assert torch.get_num_threads() == before
    told = json.loads(output.read_text())
    points = told["points"]
    assert [(each["threads"], each["context"], each["rows"]) for each in points] == [
        (1, 100, 1),
        (1, 100, 3),
        (1, 200, 1),
        (1, 200, 3),
    ]
    for each in points:
        assert each["context"] - 40 < each["mean_context"] < each["context"]
        assert each["tokens_per_second"] == pytest.approx(each["rows"] / each["step_milliseconds"] * 1e3)
    assert str(tiny_llama_dir.parent) not in output.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "ms a step" in capsys.readouterr().out


def test_grid() -> None:
    assert grid([8, 1], [MOST_TOKENS, 100]) == [(1, 100), (8, 100), (1, MOST_TOKENS)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "4096"], "threads=4096: at most "),
        (["--rows", "9", "--context", "8000"], "rows=[9]: at most 32768 tokens in all rows"),
        (["--rows", "1", "--context", "600"], "context=600: at most 479"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tiny_llama_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert bench_scaling(monkeypatch, "--model", str(tiny_llama_dir), *arguments) == 2
    assert f"error: {message}" in capsys.readouterr().err
