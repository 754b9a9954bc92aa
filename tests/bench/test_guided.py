"""The cost of structured outputs, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from paged_backend import cli


def test_schemas_and_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama_dir: Path) -> None:
    output = tmp_path / "guided.json"
    command = ["paged-backend", "bench", "guided", "--model", str(tiny_llama_dir), "--output", str(output)]
    sizes = ["--rows", "3", "--tokens", "4", "--repeat", "2", "--set", "device=cpu", "--set", "num_blocks=64"]
    monkeypatch.setattr(sys, "argv", command + sizes)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    told = json.loads(output.read_text())
    assert [cost["schema"] for cost in told["schemas"]] == ["small", "medium", "large"]
    for cost in told["schemas"]:
        assert 0 < cost["fill_median_us"] <= cost["fill_p99_us"]
        assert cost["recall_ms"] > 0
        assert cost["compile_ms"] > 0
    assert [step["rows"] for step in told["steps"]] == [3]
