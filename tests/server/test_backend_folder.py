"""Models that hold no model.py, under the backends `paged` and `vllm`."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from paged_backend.config import EngineConfig
from paged_backend.errors import InvalidArgument
from tests.server.client import ENGINE, Client
from triton_server_model.launcher import MODEL_NAME, install_backend, packaged_repository
from triton_server_model.vllm_config import engine_fields

VLLM_SAMPLE = {"disable_log_requests": True, "gpu_memory_utilization": 0.5, "enforce_eager": True}
"""All that Triton's sample of a vLLM model says beside the model, and the next two do for the tiny one."""
VLLM = VLLM_SAMPLE | {"disable_log_stats": False, "dtype": "float", "num_gpu_blocks_override": 512}


def test_models_without_code(client: Client, repository: Path, tiny_llama_dir: Path) -> None:
    body = {"text_input": "the fox", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    expected = client.generate(body).json()["text_output"]
    model = {"model": str(tiny_llama_dir)}
    _write(repository / "ours", "paged", {"engine.json": ENGINE | model, "model.json": {"not": "read"}})
    _write(repository / "theirs", "vllm", {"model.json": VLLM | model})

    def serve(name: str) -> str:
        client.http.post(f"/v2/repository/models/{name}/load").raise_for_status()
        text: str = client.http.post(f"/v2/models/{name}/generate", json=body).json()["text_output"]
        client.unload(name)
        return text

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(serve, ["ours", "theirs"])) == [expected, expected]


def test_unsupported_vllm_argument_is_refused(client: Client, repository: Path) -> None:
    _write(repository / "two_gpus", "vllm", {"model.json": {"model": "x", "tensor_parallel_size": 2}})
    answer = client.http.post("/v2/repository/models/two_gpus/load")
    assert answer.status_code == 400
    assert "model.json: tensor_parallel_size=2: only 1 is supported" in answer.text


def _write(model: Path, backend: str, files: dict[str, Any]) -> None:
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(f'backend: "{backend}"\ninstance_group [{{ count: 1 kind: KIND_MODEL }}]\n')
    for name, fields in files.items():
        (model / "1" / name).write_text(json.dumps(fields))


def test_vllm_arguments() -> None:
    arguments = VLLM | {
        "model": "org/name",
        "tokenizer": "org/name",
        "max_model_len": 4096,
        "swap_space": 4,
        "tensor_parallel_size": 1,
        "quantization": None,
        "dtype": "half",
    }
    assert EngineConfig(**engine_fields(arguments)) == EngineConfig(
        model="org/name",
        max_model_len=4096,
        swap_space_bytes="4GiB",
        gpu_memory_utilization=0.5,
        cuda_graphs=False,
        num_blocks=512,
        dtype="float16",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_lora": True}, "enable_lora=True: only False is supported"),
        ({"speculative_config": {}}, "speculative_config={}: no such argument of vLLM's is supported"),
        ({"tokenizer": "org/other"}, "tokenizer='org/other': no such argument of vLLM's is supported"),
    ],
)
def test_vllm_arguments_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        engine_fields({"model": "org/name"} | arguments)
    assert str(refusal.value) == message


def test_install_backend(tmp_path: Path) -> None:
    code = "from paged_backend.cli import main; main()"
    command = [sys.executable, "-c", code, "install-backend", str(tmp_path), "--name", "vllm"]
    for _ in range(2):  # again after an upgrade
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert f"installed {tmp_path / 'vllm'}\n" in done.stdout
    shim = packaged_repository() / MODEL_NAME / "1" / "model.py"
    assert (tmp_path / "vllm" / "model.py").read_bytes() == shim.read_bytes()


@pytest.mark.parametrize("file", ["model.py", "libtriton_theirs.so"])
def test_foreign_backend_is_left_alone(tmp_path: Path, file: str) -> None:
    theirs = tmp_path / "theirs" / file
    theirs.parent.mkdir()
    theirs.write_text("import vllm")
    with pytest.raises(InvalidArgument, match="is another backend; move it away"):
        install_backend(tmp_path, "theirs")
    assert [(path, path.read_text()) for path in theirs.parent.iterdir()] == [(theirs, "import vllm")]


@pytest.mark.parametrize("name", ["", "..", "a/b", "/a"])
def test_backend_name_is_a_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="must be letters, digits and underscores"):
        install_backend(tmp_path, name)
