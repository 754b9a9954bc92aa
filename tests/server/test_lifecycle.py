"""Loading, unloading and ending the real server."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest

from paged_backend.config import EngineConfig
from tests.server.client import Client, Stream, eventually
from tests.server.test_metrics import await_samples, samples
from triton_server_model.launcher import MODEL_NAME, TENSORRT_LLM_NAME, ServerError, TritonServer, free_ports
from triton_server_model.server_process import visible_devices

SHORT = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
PYTHON = f"python{sys.version_info[0]}.{sys.version_info[1]}"
"""Name of the engine's process."""


def test_unload_and_reload(client: Client) -> None:
    """What runs, waits or does not stream is finished first; new requests are refused."""
    (stub,) = psutil.Process(client.server.process.pid).children()
    (engine,) = stub.children()
    assert "libtorch" not in Path(f"/proc/{stub.pid}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{engine.pid}/maps").read_text()
    long = {"max_tokens": 200, "ignore_eos": True}
    streams = [client.stream("the fox", sampling=long, stream=number % 2 > 0) for number in range(24)]
    for stream in streams[1::2]:
        stream.wait_for(lambda stream=stream: stream.chunks)
    client.http.post(f"/v2/repository/models/{MODEL_NAME}/unload").raise_for_status()
    late = client.stream("the fox", sampling=SHORT)
    late.finish()
    assert late.error == f"Request for unknown model: '{MODEL_NAME}' has no available versions"
    assert all(stream.finish() for stream in streams)
    assert [stream.error for stream in streams] == [None] * 24
    unloaded = {"name": MODEL_NAME, "version": "1", "state": "UNAVAILABLE", "reason": "unloaded"}
    eventually(lambda: unloaded in client.http.post("/v2/repository/index").json())
    assert not stub.is_running()
    assert not engine.is_running()
    assert client.metric("steps_total") is None
    client.http.post(f"/v2/repository/models/{MODEL_NAME}/load").raise_for_status()
    assert client.stream("the fox", sampling=SHORT).finish()
    client.await_metric("requests_ended_total", 1, reason="length")


def test_load_over_itself(client: Client, repository: Path) -> None:
    """Two instances with the same metrics live at once: the server survives, and shows those of the second."""
    server = psutil.Process(client.server.process.pid)
    for _ in range(2):
        os.utime(repository / MODEL_NAME / "1" / "engine.json")  # what has not changed is not loaded again
        client.http.post(f"/v2/repository/models/{MODEL_NAME}/load").raise_for_status()
        eventually(lambda: len(server.children()) == 1, lambda: str(server.children()))
        assert client.stream("the fox", sampling=SHORT).finish()
        client.await_metric("requests_ended_total", 1, reason="length")


def test_wrong_engine_json_is_refused(client: Client) -> None:
    answer = client.http.post("/v2/repository/models/broken/load")
    assert answer.status_code == 400
    assert (
        "engine.json: max_num_sequences=4: unknown field of EngineConfig; did you mean 'max_num_seqs'?" in answer.text
    )
    assert client.stream("the fox", sampling=SHORT).finish()


def _abandoned_regions() -> set[Path]:
    """Shared memory of Triton's Python backends that no process uses."""
    regions = set(Path("/dev/shm").glob("triton_*"))
    for path in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            used = path.read_text()
            regions = {region for region in regions if str(region) not in used}
    return {region for region in regions if region.exists()}  # not one that was just being ended


class Cli:
    """`paged-backend serve` in a process of its own, whose temporary files all lie in `tmp`."""

    def __init__(self, tmp: Path, *arguments: str, setup: str = "", **environment: str) -> None:
        self.tmp, self.ports, self.regions = tmp, free_ports(3), _abandoned_regions()
        names = ("--http-port", "--grpc-port", "--metrics-port")
        ports = [str(part) for pair in zip(names, self.ports, strict=True) for part in pair]
        # A script's background ignores Ctrl-C, and so does what is started there, these tests included.
        heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        code = f"{heed}\n{setup}\nfrom paged_backend.cli import main\nmain()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "serve", *ports, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TMPDIR": str(tmp), **environment},
        )

    def end(self) -> tuple[int, str]:
        """Exit code and output, after checking that nothing is left."""
        output, _ = self.process.communicate(timeout=60)
        assert not list(self.tmp.iterdir())
        eventually(lambda: not self.children())
        assert not _abandoned_regions() - self.regions
        return self.process.returncode, output

    def ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            url = f"http://127.0.0.1:{self.ports[0]}/v2/health/ready"
            return httpx.get(url, trust_env=False).status_code == 200
        return False

    def children(self) -> dict[str, int]:
        """Processes of the server this started, by program name."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if str(self.tmp) in path.with_name("environ").read_text():
                    found[Path(path.read_text().split("\0")[0]).name] = int(path.parent.name)
        return found


def test_serve_until_sigterm(tiny_llama_dir: Path, tmp_path: Path) -> None:
    arguments = ["--dtype", "float32", "--device", "cpu", "--kv-cache", "1MiB", "--tensorrt-llm"]
    in_background = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"  # as in a script
    cli = Cli(tmp_path, "--model", str(tiny_llama_dir), *arguments, setup=in_background)
    shown = []
    for line in cli.process.stdout:
        shown.append(line)
        if "curl" in line:
            break
    example = subprocess.run(shown[-1], shell=True, capture_output=True, text=True, check=True)
    assert "text_output" in example.stdout
    assert {"tritonserver", "triton_python_backend_stub", PYTHON} <= cli.children().keys()

    body = {"text_input": "the fox", "stream": True, "parameters": {"max_tokens": 400, "ignore_eos": True}}
    with ExitStack() as stack:
        streams = []
        for model in (MODEL_NAME, TENSORRT_LLM_NAME):
            url = f"http://127.0.0.1:{cli.ports[0]}/v2/models/{model}/generate_stream"
            response = stack.enter_context(httpx.stream("POST", url, json=body, trust_env=False, timeout=60))
            streams.append(response.iter_lines())
        assert all(next(lines).startswith("data: ") for lines in streams)
        cli.process.send_signal(signal.SIGTERM)  # what runs is finished first
        for rest in map(list, streams):
            assert len(rest) > 2
            assert not any("error" in line for line in rest)
    assert cli.end() == (0, "stopped\n")


@pytest.mark.parametrize(
    ("process", "error"),
    [
        ("tritonserver", "error: tritonserver ended with code -9"),
        (PYTHON, "error: tritonserver ended with code 0: the engine process was killed by SIGKILL, as the kernel"),
    ],
)
def test_serve_tells_that_engine_or_server_died(tiny_llama_dir: Path, tmp_path: Path, process: str, error: str) -> None:
    cli = Cli(tmp_path, "--model", str(tiny_llama_dir), "--dtype", "float32", "--device", "cpu", "--kv-cache", "1MiB")
    eventually(lambda: cli.ready(), seconds=60)
    os.kill(cli.children()[process], signal.SIGKILL)
    code, output = cli.end()
    assert code == 2
    assert error in output
    assert "Traceback" not in output


def test_engine_and_server_die_in_the_mode_none(tiny_llama_dir: Path) -> None:
    """A server that does not unload models when asked goes on calling the model ready (24.10): then its requests are
    refused at once, with the cause, and the metrics are those of an engine without load.
    """
    config = EngineConfig(model=str(tiny_llama_dir), dtype="float32", device="cpu", num_blocks=64)
    http_port, grpc_port, metrics_port = free_ports(3)
    with TritonServer(config, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port) as server:
        client = Client(server)
        (stub,) = psutil.Process(server.process.pid).children()
        (engine,) = stub.children()
        used = {"paged_backend_kv_blocks_used", "vllm:kv_cache_usage_perc", "paged_backend_requests_running"}

        def under_load() -> bool:
            streams.append(client.stream("the fox", sampling={"max_tokens": 500, "ignore_eos": True}))
            shown = samples(client)
            return all(shown[name] for name in used)

        streams: list[Stream] = []
        eventually(under_load)
        engine.kill()
        for stream in streams:
            stream.finish()
        for _ in range(3):
            answer = client.generate({"text_input": "the fox"})
            assert answer.status_code == 400
            assert "the engine process was killed by SIGKILL" in answer.json()["error"]
        assert client.http.get("/v2/health/ready").is_success
        total = {
            "paged_backend_kv_blocks_total": 64,
            'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max"}': 64,
        }
        await_samples(client, dict.fromkeys(used, 0) | total)

        server.process.kill()
        server.process.wait()
        with pytest.raises(ServerError, match="tritonserver ended with code -9"):
            server.check()


def test_serve_stops_while_starting(tiny_llama_dir: Path, tmp_path: Path) -> None:
    cli = Cli(tmp_path, "--model", str(tiny_llama_dir))
    eventually(lambda: "tritonserver" in cli.children())
    cli.process.send_signal(signal.SIGINT)
    code, output = cli.end()
    assert (code, output.splitlines()[-1:]) == (0, ["stopped"])


def test_serve_port_in_use(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, output = Cli(tmp_path, "--model", str(tiny_llama_dir), "--grpc-port", port).end()
    assert code == 2
    assert output.startswith(f"error: grpc_port={port}: ")
    assert "--grpc-port" in output
    assert len(output.splitlines()) == 1


def test_serve_without_a_server(tiny_llama_dir: Path, tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['pytriton'] = None"
    code, output = Cli(tmp_path, "--model", str(tiny_llama_dir), setup=hidden, PATH="").end()
    assert code == 2
    assert output.startswith("error: no tritonserver on PATH")
    assert "pip install 'paged-backend[server]'" in output
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/model"], "model='/no/such/model': no such directory"),
        (
            ["--model", "x", "--dtype", "int3"],
            "dtype='int3': Input should be 'auto', 'float32', 'bfloat16' or 'float16'",
        ),
        ([], "--model=None: name a model to serve, or a --repository"),
        (["--repository", "/", "--dtype", "float32"], "--repository='/': its engine.json decides dtype"),
        (
            ["--repository", "/", "--tensorrt-llm"],
            "--tensorrt-llm=True: put tensorrt_llm_bls into the --repository instead",
        ),
    ],
)
def test_serve_bad_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert Cli(tmp_path, *arguments).end() == (2, f"error: {message}\n")


@pytest.mark.parametrize(
    ("kind", "device_id", "visible", "engines"),
    [
        ("MODEL", "0", "2,3", None),
        ("CPU", "0", None, None),
        ("GPU", "1", None, "1"),
        ("GPU", "1", "GPU-a,GPU-b", "GPU-b"),
    ],
)
def test_devices_of_an_instance(
    monkeypatch: pytest.MonkeyPatch, kind: str, device_id: str, visible: str | None, engines: str | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_devices(kind, device_id).get("CUDA_VISIBLE_DEVICES") == engines
