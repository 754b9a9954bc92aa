"""Everything at once: streams that finish, are cancelled, break off, are refused, and one client that hardly reads.

PAGED_STRESS_SECONDS=120 PAGED_STRESS_STREAMS=256 is the whole of it; by default a short one runs.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from paged_backend.config import EngineConfig
from paged_backend.engine import Engine
from paged_backend.request import SamplingParams
from tests.server.client import Client, Stream, eventually
from triton_server_model.bench import countable
from triton_server_model.launcher import MODEL_NAME, TritonServer, free_ports

SECONDS = float(os.environ.get("PAGED_STRESS_SECONDS", "6"))
STREAMS = int(os.environ.get("PAGED_STRESS_STREAMS", "32"))
LONGEST = 60
ENGINE = {
    "dtype": "float32",
    "device": "cpu",
    "max_num_seqs": STREAMS // 4,  # so few that some are refused though the clients share one interpreter
    "max_waiting": STREAMS // 8,
    "num_blocks": 1024,
}


@pytest.fixture(scope="module")
def config(tiny_llama_dir: Path) -> Iterator[EngineConfig]:
    """Every token of its model is one character."""
    with countable(EngineConfig(model=str(tiny_llama_dir), **ENGINE)) as (config, _):
        yield config


@pytest.fixture(scope="module")
def client(config: EngineConfig) -> Iterator[Client]:
    http_port, grpc_port, metrics_port = free_ports(3)
    with TritonServer(config, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port) as server:
        client = Client(server)
        yield client
        client.http.close()


class Load:
    """What all clients did, and the texts they had to get."""

    def __init__(self, client: Client, texts: dict[str, str]) -> None:
        self.client, self.texts = client, texts
        self.until = time.monotonic() + SECONDS
        self.outcomes: Counter[str] = Counter()
        self.failures: list[str] = []
        self._lock = threading.Lock()

    def run(self, number: int) -> None:
        """One client after the other until time is up."""
        rng = random.Random(number)
        while time.monotonic() < self.until:
            try:
                outcome = self._http(rng) if number % 5 == 0 else self._grpc(rng)
            except Exception as error:
                outcome = "failed"
                self.failures.append(repr(error))
            with self._lock:
                self.outcomes[outcome] += 1

    def _grpc(self, rng: random.Random) -> str:
        prompt, length = rng.choice(list(self.texts)), rng.randint(1, LONGEST)
        wrong = rng.random() < 0.1
        sampling = {"max_tokens": -1 if wrong else length, "temperature": 0, "ignore_eos": True}
        stream = self.client.stream(prompt, sampling=sampling, stream=rng.random() < 0.8, exclude=True)
        if not wrong and rng.random() < 0.25:
            if rng.random() < 0.5:
                stream.wait_for(lambda: stream.chunks)
            stream.cancel()
            return "cancelled"
        text = stream.finish()
        if wrong:
            assert stream.error is not None
            assert "max_tokens=-1" in stream.error
            return "wrong"
        return self._check(prompt, length, text, stream)

    def _check(self, prompt: str, length: int, text: str, stream: Stream) -> str:
        if stream.error is not None:
            assert "max_waiting is" in stream.error, stream.error
            return "refused"
        assert text == self.texts[prompt][:length], f"{len(text)} of {length} tokens"
        return "finished"

    def _http(self, rng: random.Random) -> str:
        prompt, length = rng.choice(list(self.texts)), rng.randint(1, LONGEST)
        parameters = {"max_tokens": length, "temperature": 0, "ignore_eos": True}
        body = {"text_input": prompt, "stream": True, "parameters": parameters}
        url = f"http://{self.client.server.address('http')}/v2/models/{MODEL_NAME}/generate_stream"
        broken_off, text = rng.random() < 0.2, ""
        with httpx.stream("POST", url, json=body, trust_env=False, timeout=120) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        assert "max_waiting is" in event["error"], event
                        return "refused"
                    text += event["text_output"]
                if broken_off and text:
                    return "cancelled"
            if response.status_code == 400:
                return "refused"
        assert text == self.texts[prompt][:length], f"HTTP: {len(text)} of {length} tokens"
        return "finished"


def hardly_read(client: Client, prompt: str, ended: threading.Event) -> int:
    """Ask for a long answer over HTTP and read a byte a second."""
    parameters = {"max_tokens": 400, "temperature": 0, "ignore_eos": True}
    body = json.dumps({"text_input": prompt, "stream": True, "parameters": parameters})
    host, port = client.server.address("http").split(":")
    read = 0
    with socket.create_connection((host, int(port))) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        head = (
            f"POST /v2/models/{MODEL_NAME}/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        sock.sendall((head + body).encode())
        while not ended.wait(1):
            read += len(sock.recv(1))
    return read


def resident(server: TritonServer) -> float:
    """MiB of the server and all processes it started."""
    root = psutil.Process(server.process.pid)
    return sum(process.memory_info().rss for process in [root, *root.children(recursive=True)]) / 2**20


def test_every_accepted_request_ends_once_and_no_token_is_lost(client: Client, config: EngineConfig) -> None:
    prompts = ["".join(chr(0x10000 + 3 + (7 * i + row) % 120) for i in range(5 + 9 * row)) for row in range(12)]
    engine = Engine(config)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=LONGEST, temperature=0, ignore_eos=True))
    engine.close()
    load = Load(client, {prompt: output.text for prompt, output in zip(prompts, outputs, strict=True)})
    ended, read = threading.Event(), []
    slow = threading.Thread(target=lambda: read.append(hardly_read(client, prompts[0], ended)))
    threads = [threading.Thread(target=load.run, args=(number,)) for number in range(STREAMS + STREAMS // 4)]
    for thread in (slow, *threads):
        thread.start()
    time.sleep(SECONDS / 2)
    before = resident(client.server)
    for thread in threads:
        thread.join(SECONDS + 120)
    assert not any(thread.is_alive() for thread in threads), "a client waits for an answer that never comes"
    growth = resident(client.server) - before
    ended.set()
    slow.join(10)
    assert not load.failures, load.failures[:5]
    assert min(load.outcomes[outcome] for outcome in ("finished", "cancelled", "wrong", "refused")) > 0, load.outcomes
    assert read[0] > 0
    for gauge in ("kv_blocks_used", "requests_running", "requests_waiting"):
        client.await_metric(gauge, 0)
    least, most = load.outcomes["finished"], load.outcomes["finished"] + load.outcomes["cancelled"] + 1
    eventually(lambda: least <= total(client) <= most, lambda: f"{total(client)} ended, {load.outcomes}")
    assert client.metric("requests_ended_total", reason="error") == 0
    assert growth < 100, f"{growth:.0f} MiB more after half of it"


def total(client: Client) -> float:
    return sum(client.metric("requests_ended_total", reason=reason) or 0 for reason in ("length", "stop", "abort"))
