"""The process of an engine, started by `EngineProcess`: python -m paged_backend.engine_worker PIPE SHARED OWNER PARENT

PIPE is a file descriptor, OWNER the process at its other end, PARENT the process that the owner is to end with, or 0.
SHARED is the descriptor of a file of 8 bytes, where the owner sees when the step began that the engine is in.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import logging.handlers
import mmap
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import psutil

from paged_backend.engine_messages import Abort, Collect, Families, Loaded, Packer, Submit, portable
from paged_backend.errors import EngineDead, Overloaded, PagedBackendError
from paged_backend.outputs import failed
from paged_backend.pacing import Pace, let_compute
from paged_backend.request import RequestOutput, SamplingParams
from paged_backend.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paged_backend.config import EngineConfig
    from paged_backend.engine import Engine
    from paged_backend.request import Request

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 10
"""After which a process that was told to end does so in the middle of a step."""
_ORPHAN_SECONDS = 1
"""The same, when there is nobody left to answer."""
_LOOK_SECONDS = 0.25
"""Between looks at whether the owner and its parent are there."""
_SWITCH_SECONDS = 0.0005
"""How long one thread may keep the interpreter when another wants it. Each request that is taken in wants it a few
times, and Python's 5 ms add up where hundreds arrive while the engine is busy; nor is the engine to wait for them."""
_QUIET_SECONDS = 0.002
"""For which no request has come: then an idle engine on a CPU begins with those that are there. Many that are sent at
once come 0.3 ms apart; a step for the first alone would take longer than to take all of them in, and delay it."""
_GATHER_SECONDS = 0.1
"""For which it waits at most."""


class Worker:
    """An engine on the main thread; a thread that takes in what the owner sends, and one that sends outputs.

    One more takes in the requests with grammars, since a bad one can take seconds to compile.
    """

    def __init__(self, owner: Connection, step_began: memoryview[float], servers: Sequence[int]) -> None:
        """`step_began[0]` is set to the `time.monotonic()` of each step, and to 0 after it.

        `servers` are the processes that are to leave the cores to an engine that computes on them.
        """
        self._owner, self._step_began, self._servers = owner, step_began, servers
        self._engine: Engine
        self._submitted: list[Request] = []
        self._aborted: list[str] = []
        self._closing = False
        self._arriving: dict[str, Submit] = {}
        """Those that are being taken in, or wait for that."""
        self._state = threading.Condition()  # guards these four
        self._guided: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Ids of those with grammars; some may have been aborted."""
        self._outbox: queue.SimpleQueue[
            list[RequestOutput] | Families | Loaded | logging.LogRecord | Exception | None
        ] = queue.SimpleQueue()

    def run(self, config: EngineConfig) -> None:
        """Make the engine, say whether that went well, and step it until the owner closes its end."""
        reader = threading.Thread(target=self._read, name="paged-reader", daemon=True)
        reader.start()  # at once: the owner may go away while the model is being loaded
        threading.Thread(target=self._compile, name="paged-compiler", daemon=True).start()
        writer = threading.Thread(target=self._write, args=[config.stream_interval], name="paged-writer", daemon=True)
        writer.start()
        self._log()
        try:
            from paged_backend.engine import Engine

            self._engine = Engine(config)
        except Exception as error:
            if not isinstance(error, PagedBackendError):
                logger.exception("the engine could not be made")
            self._outbox.put(Loaded(portable(error)))
        else:
            self._outbox.put(Loaded(None))
            try:
                self._serve(self._engine)
            except Exception as error:
                logger.exception("the engine failed in an unforeseen way")
                self._outbox.put(_dead(error))
        self._outbox.put(None)
        writer.join()

    def _log(self) -> None:
        """The owner logs what is logged here, as it logs what it says itself."""
        logging.getLogger().addHandler(_Forwarding(self._outbox))
        for name in ("paged_backend", "paged_kernels"):
            logging.getLogger(name).setLevel(logging.INFO)

    def _serve(self, engine: Engine) -> None:
        shares_cores = engine.model.device.type == "cpu"
        pace = Pace(engine.config.stream_share) if shares_cores else None
        if shares_cores and engine.config.stream_share < 1:
            for process in self._servers:
                let_compute(process)
        while engine.error is None:
            with self._state:
                while not (self._submitted or self._aborted or self._closing or engine.has_work):
                    self._state.wait()
                if shares_cores and not engine.has_work:
                    self._gather()
                for request in self._submitted:
                    engine.enqueue(request)
                for request_id in self._aborted:
                    engine.abort(request_id)
                self._submitted.clear()
                self._aborted.clear()
                closing = self._closing
            if closing:
                engine.close()
            self._step_began[0] = time.monotonic()
            outputs = engine.step()
            self._step_began[0] = 0
            if engine.error is not None and not closing:
                for output in outputs:
                    output.error = _dead(engine.error) if output.error is engine.error else output.error
            if pace is not None:
                outputs = pace.next(outputs)
            if outputs:
                self._outbox.put(outputs)
        if not closing:
            self._collect()
            self._outbox.put(_dead(engine.error))

    def _gather(self) -> None:
        """Wait for more requests, as long as they come right after each other."""
        end, before = time.monotonic() + _GATHER_SECONDS, 0
        while before < len(self._submitted) and (left := end - time.monotonic()) > 0:
            before = len(self._submitted)
            self._state.wait(min(_QUIET_SECONDS, left))

    def _read(self) -> None:
        try:
            while True:
                self._obey(self._owner.recv())
        except (EOFError, OSError):
            pass
        except Exception:
            logger.exception("commands cannot be read")
        with self._state:
            self._closing = True
            self._state.notify()
        time.sleep(_CLOSE_SECONDS)
        os._exit(1)

    def _obey(self, command: Submit | Abort | Collect) -> None:
        match command:
            case Submit():
                self._admit(command)
            case Abort(request_ids):
                with self._state:
                    for request_id in request_ids:
                        if self._arriving.pop(request_id, None) is None:
                            self._aborted.append(request_id)
                        else:  # the engine does not know it yet
                            self._outbox.put([RequestOutput(request_id, "", [], 0, 0, "abort", finished=True)])
                    self._state.notify()
            case Collect():
                self._collect()

    def _admit(self, command: Submit) -> None:
        """Take a request in, or have it taken in later, if there is room: that it must have before it costs time."""
        try:
            with self._state:
                self._engine.check_room(len(self._submitted) + len(self._arriving))
                self._arriving[command.request_id] = command
        except Overloaded as error:
            self._outbox.put([failed(command.request_id, error)])
            return
        match command.params:
            case SamplingParams(structured_outputs=StructuredOutputs()):
                self._guided.put(command.request_id)
            case _:
                self._take_in(command)

    def _compile(self) -> None:
        while True:
            request_id = self._guided.get()
            with self._state:
                command = self._arriving.get(request_id)
            if command is not None:
                self._take_in(command)

    def _take_in(self, command: Submit) -> None:
        request_id, prompt, params, options, arrival_time = command
        made: Request | Exception
        try:
            made = self._engine.make_request(prompt, params, options, request_id, arrival_time)
        except Exception as error:  # a plugin's filter may raise anything
            made = error
        with self._state:
            if self._arriving.get(request_id) is not command:
                return  # aborted meanwhile
            del self._arriving[request_id]
            if isinstance(made, Exception):
                self._outbox.put([failed(request_id, made)])
            else:
                self._submitted.append(made)
                self._state.notify()

    def _collect(self) -> None:
        self._outbox.put(Families(list(self._engine.metrics.registry.collect())))

    def _write(self, interval: int) -> None:
        packer = Packer(interval)
        try:
            while (item := self._outbox.get()) is not None:
                message = packer.pack(item) if isinstance(item, list) else item
                self._owner.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        except OSError:
            return  # the owner has gone, as the reader sees too
        except BaseException:
            traceback.print_exc()  # the log would go the same way
            os._exit(1)  # so that nobody waits for them


class _Forwarding(logging.handlers.QueueHandler):
    """Puts records that can be pickled: without what `extra` has put into them, but for `request_id`."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Only what is shown; a traceback is part of the message."""
        kept = {name: getattr(record, name) for name in ("name", "levelno", "levelname", "created")}
        if hasattr(record, "request_id"):
            kept["request_id"] = str(record.request_id)
        return logging.makeLogRecord(kept | {"msg": self.format(record)})


def _dead(error: Exception) -> EngineDead:
    return EngineDead(f"the engine has stopped: {error}")


def _watch(owner: int, parent: int) -> None:
    """End with the owner, and the owner with its parent, if that is not 0."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(owner)
        while os.getppid() == owner and parent in (0, process.ppid()):
            time.sleep(_LOOK_SECONDS)
        if os.getppid() == owner:
            process.kill()
    time.sleep(_ORPHAN_SECONDS)
    os._exit(1)


def main() -> None:
    """Serve the owner at the other end of the pipe."""
    faulthandler.enable()
    # A Ctrl-C in the terminal, or a shutdown of the machine, is for the server: it ends us when its requests are done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.setswitchinterval(_SWITCH_SECONDS)
    with contextlib.suppress(OSError, AttributeError):
        if os.sched_getscheduler(0) == os.SCHED_BATCH:  # another engine has set it for our owner, it is not for us
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    pipe, shared, *processes = map(int, sys.argv[1:])
    threading.Thread(target=_watch, args=processes, name="paged-watch", daemon=True).start()
    owner = Connection(pipe)
    os.set_inheritable(owner.fileno(), False)  # or a process started here would keep the pipe open
    step_began = memoryview(mmap.mmap(shared, 8)).cast("d")
    os.close(shared)
    Worker(owner, step_began, [process for process in processes if process]).run(owner.recv())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a broken device can hang the interpreter's own way out


if __name__ == "__main__":
    main()
