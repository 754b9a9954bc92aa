"""Runs a real tritonserver that serves one engine."""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from paged_backend.config import EngineConfig
from paged_backend.errors import InvalidArgument, PagedBackendError
from paged_backend.interrupts import HeldBack

MODEL_NAME = "paged_llm"
"""Name of the packaged model, and its folder in the model repository."""
TENSORRT_LLM_NAME = "tensorrt_llm_bls"
"""Name of the one for clients of TensorRT-LLM's models."""
BACKEND_NAMES = ("paged", "vllm")
"""What model folders may say as `backend` under a server that the launcher gives its backends."""
_PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
_EXIT_SECONDS = 10
"""How long the server lets running requests finish when told to stop."""


class ServerError(PagedBackendError):
    """tritonserver is not there, did not start, or died."""


@dataclass(frozen=True)
class Installation:
    """A tritonserver to run."""

    binary: pathlib.Path
    wheel: pathlib.Path | None
    """The server's folder inside the nvidia-pytriton wheel; None for a server of the system."""


def find_tritonserver() -> Installation:
    """The tritonserver on PATH, else the one in the nvidia-pytriton wheel. Raises `ServerError` without either."""
    if binary := shutil.which("tritonserver"):
        return Installation(pathlib.Path(binary), None)
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError(
            "no tritonserver on PATH, and nvidia-pytriton, which carries one, is not installed: "
            "pip install 'paged-backend[server]'"
        )
    wheel = pathlib.Path(spec.origin).parent / "tritonserver"
    if not _stub(wheel).exists():
        raise ServerError(
            f"the tritonserver in nvidia-pytriton has no backend for Python {_PYTHON}; put another on PATH"
        )
    numpy = importlib.metadata.version("numpy")
    if int(numpy.split(".")[0]) >= 2 and importlib.metadata.version("nvidia-pytriton").startswith("0.7."):
        raise ServerError(
            f"the tritonserver 2.51 in nvidia-pytriton aborts on text with numpy {numpy}: pip install 'numpy<2', "
            "or put a newer tritonserver on PATH"
        )
    return Installation(wheel / "bin" / "tritonserver", wheel)


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports of this machine that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in sockets]


class TritonServer:
    """A running tritonserver as a context manager: inside, it is ready; after, nothing of it is left.

    Serves the packaged model with an engine of that config, or an operator's own model repository as it is. Entering
    raises `InvalidArgument` for a bad model or a port that is taken, `ServerError` when the server cannot start.
    `verbose` sends the server's log to stderr; else errors quote its end. `arguments` are further ones of tritonserver.
    `tensorrt_llm` puts the model for TensorRT-LLM's clients beside that config's.
    """

    def __init__(
        self,
        served: EngineConfig | pathlib.Path,
        *,
        host: str = "127.0.0.1",
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        verbose: bool = False,
        arguments: Sequence[str] = (),
        tensorrt_llm: bool = False,
        start_timeout: float = 600,
    ) -> None:
        self.host = host
        self.ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        self._served, self._verbose, self._arguments = served, verbose, arguments
        self._names = (MODEL_NAME, TENSORRT_LLM_NAME) if tensorrt_llm else (MODEL_NAME,)
        self._start_timeout = start_timeout
        self._region_prefix = f"triton_paged_{uuid.uuid4().hex[:12]}"

    def __enter__(self) -> Self:
        installation = find_tritonserver()
        for name, port in self.ports.items():
            _require_free(self.host, port, name)
        with contextlib.ExitStack() as stack:
            folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="paged-backend-")))
            repository = self._served
            if isinstance(repository, EngineConfig):
                repository = _repository(repository, self._names, folder)
            stack.callback(self._remove_regions)
            with HeldBack():  # or a Ctrl-C now would leave a server that nobody ends
                self._start(installation, repository, folder)
                stack.callback(self._end)
            self._wait_ready()
            self._stop = stack.pop_all().close
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def address(self, service: str) -> str:
        """`host:port` of "http", "grpc" or "metrics"."""
        return f"{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.ports[service]}"

    def check(self) -> None:
        """Raises `ServerError` with the end of the log if the server has died."""
        if self.process.poll() is not None:
            raise ServerError(f"tritonserver ended with code {self.process.returncode}{self._log_tail()}")

    def _end(self) -> None:
        # Running requests get some time to finish.
        try:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_EXIT_SECONDS + 5)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # the Python stubs are in its group
            self.process.wait()

    def _remove_regions(self) -> None:
        for region in pathlib.Path("/dev/shm").glob(f"{self._region_prefix}*"):
            region.unlink(missing_ok=True)

    def _start(self, installation: Installation, repository: pathlib.Path, folder: pathlib.Path) -> None:
        command = [str(installation.binary), f"--model-repository={repository}"]
        for name, port in self.ports.items():
            command += [f"--{name}-address={self.host}", f"--{name}-port={port}"]
        command += [f"--exit-timeout-secs={_EXIT_SECONDS}", *self._arguments]
        command += [f"--backend-config=python,shm-region-prefix-name={self._region_prefix}"]
        if installation.wheel is not None:
            command += [f"--backend-directory={_linked_backends(installation.wheel, folder)}"]
        self._log = folder / "server.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr if self._verbose else log,
                stderr=subprocess.STDOUT,
                env=_environment(folder),
                start_new_session=True,  # a Ctrl-C is for this process, which then stops the server in order
            )

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        while not self._ready():
            self.check()
            if time.monotonic() > deadline:
                raise ServerError(f"tritonserver was not ready after {self._start_timeout:.0f} s{self._log_tail()}")
            time.sleep(0.1)

    def _ready(self) -> bool:
        connection = http.client.HTTPConnection(self.address("http"), timeout=1)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _log_tail(self) -> str:
        """Why models failed to load or engines died, if any did, else the last lines."""
        log = self._log.read_text(errors="replace").replace("\0", "")
        where = r"(?:failed to load '.*' version \d+|paged_backend\.engine_process)"
        causes = re.findall(where + r": (.*?)(?:\\n\\nAt:.*)?\"$", log, re.MULTILINE)
        lines = causes or log.splitlines()[-15:]
        return "\n  ".join([":", *lines]) if lines else ""


def packaged_repository() -> pathlib.Path:
    """The model repository that this package ships; beside the package in a source checkout."""
    package = pathlib.Path(__file__).parent
    inside = package / "model_repository"
    return inside if inside.is_dir() else package.parent / "model_repository"


def install_backend(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Put this package into Triton's backend `directory` as the backend `name`, and return its folder there.

    Raises `InvalidArgument` for a name that is no folder's or is another backend's, OSError where it cannot write.
    """
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise InvalidArgument("name", name, "must be letters, digits and underscores")
    folder = directory / name
    model = folder / "model.py"
    if folder.exists() and not (model.is_file() and __package__ in model.read_text()):
        raise InvalidArgument("name", name, f"{folder} is another backend; move it away, or choose another name")
    folder.mkdir(exist_ok=True)
    shutil.copy(packaged_repository() / MODEL_NAME / "1" / "model.py", model)
    return folder


def _stub(wheel: pathlib.Path) -> pathlib.Path:
    return wheel / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"


def _linked_backends(wheel: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    python = folder / "backends" / "python"
    python.mkdir(parents=True)
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        # A copy: for a backend that is written in Python, the server refuses a library that a symlink leads out to.
        shutil.copy(wheel / "backends" / "python" / name, python)
    (python / "triton_python_backend_stub").symlink_to(_stub(wheel))
    for name in BACKEND_NAMES:
        install_backend(python.parent, name)
    return python.parent


def _environment(folder: pathlib.Path) -> dict[str, str]:
    """The stub takes its packages from the `python3` that is first on PATH, and its interpreter from the loader."""
    first = {"PATH": str(pathlib.Path(sys.executable).parent)}
    libpython = pathlib.Path(sys.base_prefix, "lib", f"libpython{_PYTHON}.so.1.0")
    if libpython.exists():  # else it is where the loader looks anyhow; another 3.x.y than python3's fails on import
        (folder / "lib").mkdir()
        (folder / "lib" / libpython.name).symlink_to(libpython)
        first["LD_LIBRARY_PATH"] = str(folder / "lib")
    rest = {name: os.environ[name] for name in first if os.environ.get(name)}
    return os.environ | {name: ":".join([path, rest[name]] if name in rest else [path]) for name, path in first.items()}


def _require_free(host: str, port: int, name: str) -> None:
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise InvalidArgument(
            f"{name}_port", port, f"cannot listen on {host}: {error}; choose another with --{name}-port"
        ) from None


def _repository(config: EngineConfig, names: Sequence[str], folder: pathlib.Path) -> pathlib.Path:
    from paged_backend.models import resolve

    local = str(resolve(config.require_model(), config.revision).resolve())
    fields = config.model_dump(mode="json", exclude_unset=True) | {"model": local, "revision": None}
    models = folder / "models"
    for name in names:
        shutil.copytree(packaged_repository() / name, models / name, ignore=shutil.ignore_patterns("__pycache__"))
    (models / MODEL_NAME / "1" / "engine.json").write_text(json.dumps(fields))
    return models
