"""A thread that steps an engine for many concurrent callers."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType

from paged_backend.engine import Engine, Prompt, join, output_of, spread
from paged_backend.errors import EngineDead, InvalidArgument, Overloaded
from paged_backend.request import OutputCallback, Request, RequestOutput, SamplingParams
from paged_backend.stats import EngineStats

logger = logging.getLogger(__name__)


class EngineThread:
    """Owns an engine and the daemon thread that steps it. Its methods may be called from any thread.

    Every accepted request gets exactly one last output (`finish_reason` set), whatever happens to the engine.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._callbacks: dict[str, OutputCallback] = {}
        self._arrived: list[Request] = []
        self._aborted: list[str] = []
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="paged-backend-engine", daemon=True)
        self._thread.start()

    @property
    def error(self) -> Exception | None:
        """What killed the engine; None while it serves."""
        return self.engine.error

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_output: OutputCallback,
        request_id: str | None = None,
    ) -> str:
        """Accept a request and return its id.

        `on_output` is called on the engine's thread with what is new; it must be quick and must not raise. Raises
        `InvalidArgument`, `Overloaded` or `EngineDead` here, in the caller's thread, with nothing accepted.
        """
        request = self.engine.make_request(prompt, params, request_id)
        with self._wake:
            if self._closing or self.engine.error is not None:
                raise EngineDead(f"the engine has stopped: {self.engine.error or 'it was closed'}")
            waiting = self.engine.stats().num_waiting + len(self._arrived)
            if waiting >= self.engine.config.max_waiting:
                raise Overloaded(f"{waiting} requests wait already; max_waiting is {self.engine.config.max_waiting}")
            if request.request_id in self._callbacks:
                raise InvalidArgument("request_id", request.request_id, "is in use by a request that has not ended")
            self._callbacks[request.request_id] = on_output
            self._arrived.append(request)
            self._wake.notify()
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request soon, with finish reason "abort". Unknown and ended ids are ignored."""
        with self._wake:
            self._aborted.append(request_id)
            self._wake.notify()

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Outputs of one prompt as they come. Leaving the iterator early aborts the request."""
        outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        request_id = self.submit(prompt, params, on_output=outputs.put)
        try:
            while not (output := outputs.get()).finished:
                yield output
            yield output
        finally:
            self.abort(request_id)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Whole outputs of all prompts, in order. If one is refused, those before it are aborted, and it raises."""
        outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
        parts: dict[str, list[RequestOutput]] = {}
        try:
            for prompt, one in zip(prompts, spread(params, len(prompts)), strict=True):
                parts[self.submit(prompt, one, on_output=outputs.put)] = []
            unfinished = len(parts)
            while unfinished:
                output = outputs.get()
                parts[output.request_id].append(output)
                unfinished -= output.finished
        except BaseException:
            for request_id in parts:
                self.abort(request_id)
            raise
        return [join(collected) for collected in parts.values()]

    def stats(self) -> EngineStats:
        """Numbers of the engine now."""
        return self.engine.stats()

    def close(self) -> None:
        """Abort what runs, stop the thread and close the engine. Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> EngineThread:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._arrived or self._aborted or self._closing or self.engine.has_work):
                    self._wake.wait()
                arrived, self._arrived = self._arrived, []
                aborted, self._aborted = self._aborted, []
                closing = self._closing
            for request in arrived:
                self._accept(request)
            for request_id in aborted:
                self.engine.abort(request_id)
            if closing:
                self.engine.close()
            self._deliver(self.engine.step())
            if closing:
                return

    def _accept(self, request: Request) -> None:
        try:
            self.engine.enqueue(request)
        except Exception as error:  # the engine died since `submit`
            request.end("error", error)
            self._deliver([output_of(request, [], "")])

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            callback = self._callbacks.pop(output.request_id) if output.finished else self._callbacks[output.request_id]
            try:
                callback(output)
            except Exception:
                logger.exception("the output callback of request %s failed; the request is aborted", output.request_id)
                self.engine.abort(output.request_id)
