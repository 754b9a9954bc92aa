"""The accuracy of number formats, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from paged_kernels.cpu import library

from paged_backend import cli


@pytest.mark.skipif(library.load() is None, reason="the CPU kernels are not built")
def test_formats_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama_dir: Path) -> None:
    output = tmp_path / "accuracy.json"
    command = ["paged-backend", "bench", "accuracy", "--model", str(tiny_llama_dir), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*command, "--set", "num_blocks=64"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    told = json.loads(output.read_text())
    assert told["model"] == tiny_llama_dir.name
    first, *others = told["formats"]
    assert (first["dtype"], first["difference"], first["mean_deviation"], first["same_likeliest"]) == (
        "float32",
        0,
        0,
        1,
    )
    assert [(each["dtype"], each["quantization"]) for each in others] == [("bfloat16", None), ("bfloat16", "int8")]
    for each in others:
        assert each["tokens"] == first["tokens"] == 510  # the context is 512, and one token is generated
        assert 0 < each["mean_deviation"] < 0.1
        assert abs(each["difference"]) <= each["mean_deviation"]
        assert 0.5 < each["same_likeliest"] <= 1
