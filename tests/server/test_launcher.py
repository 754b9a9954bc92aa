"""Finding a server, and the demo that runs one."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from paged_backend.bench.prompts import PROMPTS
from triton_server_model.launcher import ServerError, find_tritonserver


def test_server_on_path_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    in_wheel = find_tritonserver()
    assert in_wheel.wheel is not None
    assert in_wheel.binary.is_file()
    own = tmp_path / "tritonserver"
    own.touch(mode=0o755)
    assert find_tritonserver().binary == own


def test_numpy_2_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(importlib.metadata, "version", {"numpy": "2.4.0", "nvidia-pytriton": "0.7.0"}.__getitem__)
    with pytest.raises(ServerError, match=r"numpy 2\.4\.0: pip install 'numpy<2'"):
        find_tritonserver()


def test_demo(tiny_llama_dir: Path) -> None:
    command = [sys.executable, "-m", "triton_server_model.demo", "--model", str(tiny_llama_dir), "--max-tokens", "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert all(done.stdout.count(question[:20]) == 2 for question in PROMPTS)  # the answer, and its line of the table
    assert "tokens/s in all" in done.stdout
    assert "KV blocks: at most" in done.stdout
