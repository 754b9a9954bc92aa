"""A tiny random llama, served by the real tritonserver."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from paged_backend.config import EngineConfig
from paged_backend.engine import Engine
from tests.server.client import ENGINE, Client
from triton_server_model.launcher import MODEL_NAME, TritonServer, free_ports, packaged_repository


@pytest.fixture(scope="session", autouse=True)
def _one_thread_each() -> None:
    """Tiny models: two threads of one engine would wait for each other longer than they compute."""
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def repository(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model, its engine naming the weights relative to engine.json; and one whose engine.json is wrong."""
    root = tmp_path_factory.mktemp("repository")
    relative = {"model": f"../../../{tiny_llama_dir.relative_to(root.parent)}"}
    for name, engine in ((MODEL_NAME, ENGINE | relative), ("broken", ENGINE | relative | {"max_num_sequences": 4})):
        shutil.copytree(packaged_repository() / MODEL_NAME, root / name)
        (root / name / "1" / "engine.json").write_text(json.dumps(engine))
    return root


@pytest.fixture(scope="session")
def client(repository: Path) -> Iterator[Client]:
    http_port, grpc_port, metrics_port = free_ports(3)
    arguments = ["--model-control-mode=explicit", f"--load-model={MODEL_NAME}"]
    server = TritonServer(
        repository, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port, arguments=arguments
    )
    with server:
        client = Client(server)
        yield client
        client.http.close()  # the server waits for idle connections before it stops
    assert server.process.returncode == 0


@pytest.fixture(scope="session")
def engine(tiny_llama_dir: Path) -> Iterator[Engine]:
    """The same engine as the server's, in this process."""
    engine = Engine(EngineConfig(model=str(tiny_llama_dir), **ENGINE))
    yield engine
    engine.close()
