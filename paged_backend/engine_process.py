"""An engine in a process of its own. Imports neither torch nor transformers."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paged_backend.config import EngineConfig
from paged_backend.engine_messages import Abort, Collect, Families, Loaded, Outputs, Submit, Unpacker
from paged_backend.errors import EngineDead, InvalidArgument
from paged_backend.outputs import failed
from paged_backend.request import RequestOptions, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from prometheus_client import Metric

    from paged_backend.intake import Prompt

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 15
"""More than the process itself takes at most."""
_EXIT_SECONDS = 5
"""Between the end of the pipe and that of the process."""
_COLLECT_SECONDS = 5
_SPIN = {"GOMP_SPINCOUNT": "20000"}
"""Rounds of 20 to 60 ns for which OpenMP's threads wait for each other before they sleep, unless our environment says.
The default is 300,000, for which a thread that is done keeps the core that the one it waits for may need: beside busy
processes a step then takes two to ten times as long. On cores of its own an engine loses 2 % by 2,000, and nothing by
so many (docs/performance.md)."""
_LOAD = {
    f"paged_backend_{name}" for name in ("requests_running", "requests_waiting", "kv_blocks_used", "kv_blocks_cached")
}
"""Gauges of what an engine has no more once it has ended."""


class EngineProcess:
    """Runs an `Engine` in a child process, which ends when this one does, however that comes.

    `submit`, `abort`, `collect` and `close` may be called from any thread; one thread has to call `receive` again and
    again until `error` is set. Every request accepted by `submit` gets exactly one last output (`finished`), whatever
    happens to the engine or to its process.
    """

    def __init__(
        self, config: EngineConfig, *, environment: Mapping[str, str] | None = None, with_parent: bool = False
    ) -> None:
        """Return when the model is loaded. `environment` adds variables to this process's.

        `with_parent` has this process killed when its own parent ends: one that waits for an answer of its parent, with
        the interpreter's lock held, can do nothing about it itself.
        Raises what making the `Engine` raises, and `EngineDead` when the process dies of it.
        """
        self.error: Exception | None = None
        """Why the engine serves no more requests; None while it does."""
        self._open: set[str] = set()
        self._unpacker = Unpacker()
        self._aborted: list[str] = []
        """Not told yet."""
        self._state = threading.Lock()  # guards these and `error`
        self._sending = threading.Lock()
        self._cause: Exception | None = None
        self._closing = False
        self._families: list[Metric] = []
        self._collected = threading.Event()
        self._collecting = threading.Lock()
        self._step_timeout = config.step_timeout
        self._socket, theirs = socket.socketpair()
        self._connection = Connection(os.dup(self._socket.fileno()))
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        spin = {} if "OMP_WAIT_POLICY" in os.environ else _SPIN
        variables = spin | os.environ | path | dict(environment or {})
        with theirs, tempfile.TemporaryFile() as shared:
            shared.truncate(8)
            self._step_began = memoryview(mmap.mmap(shared.fileno(), 8)).cast("d")
            """`time.monotonic()` seconds, of the step that the engine is in; 0 between steps. No message says so: one
            that hangs may keep the interpreter's lock, without which nothing can be sent."""
            arguments = (theirs.fileno(), shared.fileno(), os.getpid(), os.getppid() if with_parent else 0)
            self.process = subprocess.Popen(
                [_python(), "-sPm", "paged_backend.engine_worker", *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), shared.fileno()],
                env=variables,
            )
        try:
            try:
                self._connection.send(config)
                while not isinstance(message := self._connection.recv(), Loaded):
                    self._take(message, [])
                refusal = message.error
            except (EOFError, OSError):
                refusal = EngineDead(f"{self._how_it_died()} while it loaded the model")
            if refusal is not None:
                raise refusal
        except BaseException:
            self.process.kill()
            self.process.wait()
            self._disconnect()
            raise

    def submit(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> None:
        """Hand over a request, which arrives now; what is wrong with it or with its time, its last output tells.

        Raises `EngineDead`, and `InvalidArgument` for an id in use, with nothing handed over.
        """
        command = _pickled(Submit(request_id, prompt, params, options, time.monotonic()))
        with self._state:
            if self.error is not None:
                raise EngineDead(str(self.error))
            if request_id in self._open:
                raise InvalidArgument("request_id", request_id, "is in use by a request that has not ended")
            self._open.add(request_id)
        self._send(command)

    def abort(self, request_id: str) -> None:
        """End a request, with finish reason "abort"; never blocks. Unknown and ended ids are ignored.

        The engine is told by the next `receive`, or by a later one while what else is on its way fills the pipe.
        """
        with self._state:
            self._aborted.append(request_id)

    def receive(self, timeout: float | None = None) -> list[RequestOutput]:
        """All outputs that are there; if there are none, wait for `timeout` seconds. For one thread only."""
        outputs: list[RequestOutput] = []
        try:
            self._tell_aborted()
            ready = self._connection.poll(timeout)
            while ready:
                self._take(self._connection.recv(), outputs)
                ready = self._connection.poll()
            if self._hangs():
                self.process.kill()
                self._end(outputs)
        except (EOFError, OSError):
            self._end(outputs)
        except Exception as error:
            logger.exception("outputs of the engine cannot be read")
            self._cause = EngineDead(f"outputs of the engine cannot be read: {error}")
            self.process.kill()
            self._end(outputs)
        return outputs

    def collect(self) -> list[Metric]:
        """The engine's Prometheus metric families: the latest it told, without load once it serves no more."""
        with self._collecting:
            self._collected.clear()
            if self.error is None:
                self._send(_pickled(Collect()))
                self._collected.wait(_COLLECT_SECONDS)
            return self._families

    def close(self) -> None:
        """Abort what runs and end the process. Idempotent."""
        self._closing = True
        with contextlib.suppress(OSError):  # its process has ended
            self._socket.shutdown(socket.SHUT_WR)
        try:
            self.process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _send(self, command: bytes) -> None:
        with self._sending, contextlib.suppress(OSError):  # its process has ended, which `receive` answers
            self._connection.send_bytes(command)

    def _hangs(self) -> bool:
        began = self._step_began[0]
        if not (began and 0 < self._step_timeout < time.monotonic() - began):
            return False
        self._cause = EngineDead(f"the engine hangs: a step has not ended after step_timeout={self._step_timeout:g} s")
        return True

    def _tell_aborted(self) -> None:
        if not self._aborted or not self._sending.acquire(blocking=False):
            return
        try:
            pipe = select.poll()
            pipe.register(self._connection, select.POLLOUT)
            if pipe.poll(0):
                with self._state:
                    aborted, self._aborted = self._aborted, []
                with contextlib.suppress(OSError):
                    self._connection.send_bytes(_pickled(Abort(aborted)))
        finally:
            self._sending.release()

    def _take(self, message: Any, outputs: list[RequestOutput]) -> None:
        match message:
            case Outputs():
                new = self._unpacker.unpack(message)
                with self._state:
                    self._open.difference_update(output.request_id for output in new if output.finished)
                outputs += new
            case Families(families):
                self._families = families
                self._collected.set()
            case logging.LogRecord():
                theirs = logging.getLogger(message.name)
                if theirs.isEnabledFor(message.levelno):
                    theirs.handle(message)
            case Exception():
                self._cause = message

    def _end(self, outputs: list[RequestOutput]) -> None:
        """Fail what is open."""
        if self.error is not None:
            return
        error = self._cause or EngineDead("the engine was closed" if self._closing else self._how_it_died())
        with self._state:
            self.error = error
            abandoned, self._open = self._open, set()
        if not self._closing:
            logger.error("%s", error)
        outputs += [failed(request_id, error) for request_id in abandoned]
        for family in self._families:
            if family.name in _LOAD:
                family.samples = [sample._replace(value=0.0) for sample in family.samples]
        self._collected.set()
        self._disconnect()

    def _disconnect(self) -> None:
        with self._sending:
            self._connection.close()
        self._socket.close()

    def _how_it_died(self) -> str:
        try:
            code = self.process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return "the engine process closed its pipe"
        if code >= 0:
            return f"the engine process exited with code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
        return f"the engine process was killed by {name}{hint}"


def _pickled(command: Submit | Abort | Collect) -> bytes:
    return pickle.dumps(command, pickle.HIGHEST_PROTOCOL)


def _python() -> str:
    """The interpreter of this version: where Python is embedded, `sys.executable` is any that was first on PATH."""
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for prefix in (sys.prefix, sys.base_prefix):
        path = Path(prefix, "bin", name)
        if os.access(path, os.X_OK):
            return str(path)
    return sys.executable
