"""What clients see when a process dies, and that nothing is left. Times are what 24.10 took on two cores."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.server.client import Client, Stream, eventually
from triton_server_model.launcher import MODEL_NAME, TritonServer, free_ports

LONG = {"max_tokens": 500, "temperature": 0, "ignore_eos": True}
SHORT = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def client(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Of a server of these tests' own, which the last of them kills; its model `pair` has two instances."""
    root = tmp_path_factory.getbasetemp() / f"{repository.name}-crash"  # weights are named relative to engine.json
    for name in (MODEL_NAME, "pair", "faulty"):
        shutil.copytree(repository / MODEL_NAME, root / name)
    (root / "faulty" / "1" / "model.py").write_text(FAULTY)
    config = root / "pair" / "config.pbtxt"
    config.write_text(re.sub("count: 1", "count: 2", config.read_text()))
    http_port, grpc_port, metrics_port = free_ports(3)
    arguments = ["--model-control-mode=explicit", f"--load-model={MODEL_NAME}"]
    server = TritonServer(
        root, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port, arguments=arguments
    )
    with server:
        client = Client(server)
        yield client
        client.http.close()
    assert not list(Path("/dev/shm").glob(f"{server._region_prefix}*"))


def _stubs(client: Client) -> list[psutil.Process]:
    """The model instances, in the order in which they were started."""
    children = psutil.Process(client.server.process.pid).children()
    return [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def _gone(*processes: psutil.Process) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def _load(client: Client, count: int, model: str) -> list[Stream]:
    """Running requests, of which every second one streams; some wait."""
    streams = [client.stream("the fox", sampling=LONG, stream=number % 2 > 0, model=model) for number in range(count)]
    for stream in streams[1:16:2]:
        stream.wait_for(lambda stream=stream: stream.chunks)
    return streams


def _state(client: Client, model: str) -> str:
    return next(row.get("state", "") for row in client.http.post("/v2/repository/index").json() if row["name"] == model)


def test_engine_killed(client: Client) -> None:
    """Every request ends with the cause after 0.1 s, streaming or not, running or queued; then the model unloads."""
    (stub,) = _stubs(client)
    (engine,) = stub.children()
    streams = _load(client, 24, MODEL_NAME)
    engine.kill()
    began = time.monotonic()
    for stream in streams:
        stream.finish()
    assert time.monotonic() - began < 5
    cause = "the engine process was killed by SIGKILL, as the kernel does when memory runs out"
    errors = [stream.error for stream in streams]
    away = f"Request for unknown model: '{MODEL_NAME}' has no available versions"
    assert errors[:1] + errors[1:16:2] == [f"Error generating stream: {cause}"] * 9
    assert set(errors) <= {errors[0], away}  # the server may have got to the last ones only now

    eventually(lambda: _state(client, MODEL_NAME) == "UNAVAILABLE")
    assert client.http.get(f"/v2/models/{MODEL_NAME}/ready").status_code == 400
    assert _gone(stub)
    assert client.server._log.read_text(errors="replace").count(cause) == 1
    late = client.stream("the fox", sampling=SHORT)
    late.finish()
    assert late.error == away

    client.http.post(f"/v2/repository/models/{MODEL_NAME}/load").raise_for_status()
    assert client.stream("the fox", sampling=SHORT).finish()


FAULTY = """
from triton_server_model.model import TritonPythonModel
from triton_server_model.sender import Sender

answer = Sender._answer

def faulty(self, request_id, outputs):
    if self._replies[request_id].request_id == "fault":
        raise RuntimeError("unforeseen")
    answer(self, request_id, outputs)

Sender._answer = faulty
"""


def test_a_fault_of_the_sender(client: Client) -> None:
    """All requests end with it, as when the engine dies."""
    client.http.post("/v2/repository/models/faulty/load").raise_for_status()
    streams = _load(client, 12, "faulty")
    streams.append(client.stream("the fox", sampling=SHORT, model="faulty", request_id="fault"))
    for stream in streams:
        stream.finish()
    assert {stream.error for stream in streams} == {
        "Error generating stream: the engine's outputs cannot be sent: unforeseen"
    }
    eventually(lambda: _state(client, "faulty") == "UNAVAILABLE")


def test_two_instances(client: Client) -> None:
    """Each has an engine; both serve; unloading waits for what runs, and ends both."""
    before = _stubs(client)
    client.http.post("/v2/repository/models/pair/load").raise_for_status()
    stubs = [stub for stub in _stubs(client) if stub not in before]
    engines = [engine for stub in stubs for engine in stub.children()]
    assert (len(stubs), len(engines)) == (2, 2)
    streams = _load(client, 8, "pair")
    for instance in ("pair_0_0", "pair_0_1"):
        eventually(lambda instance=instance: client.metric("output_tokens_total", instance=instance))
    client.http.post("/v2/repository/models/pair/unload").raise_for_status()
    assert len({stream.finish() for stream in streams}) == 2  # with the prompt, and without
    assert [stream.error for stream in streams] == [None] * 8
    eventually(lambda: _state(client, "pair") == "UNAVAILABLE")
    assert _gone(*stubs, *engines)


def test_stub_killed_then_server(client: Client) -> None:
    """24.10 does not notice that a stub has died: what runs there waits until the server ends. (A new request is told
    after 1 s that its stub is not healthy, or crashes the server.) The engine of the stub ends within 0.1 s. When the
    server is killed, every client sees its connection end at once, and stubs and engines are gone after 1 s.
    """
    for model in (MODEL_NAME, "pair"):
        client.http.post(f"/v2/repository/models/{model}/load").raise_for_status()
    first, *others = _stubs(client)
    (engine,) = first.children()
    others += [engine for stub in others for engine in stub.children()]
    assert len(others) == 4
    stuck, streams = _load(client, 24, MODEL_NAME), _load(client, 24, "pair")
    first.kill()
    eventually(lambda: _gone(engine), seconds=3)
    client.server.process.kill()
    began = time.monotonic()
    for stream in stuck + streams:
        stream.wait_for(lambda stream=stream: stream.finals)
    assert time.monotonic() - began < 5
    errors = {stream.error for stream in stuck + streams if stream.error}
    assert all("ocket closed" in error or "onnection re" in error for error in errors), errors  # reset, refused
    assert sum(stream.error is not None for stream in streams) > 0
    for stream in stuck + streams:
        stream.cancel()  # which is an error of what had ended before
    eventually(lambda: _gone(*others), seconds=5)
