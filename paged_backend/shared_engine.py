"""One engine for many threads."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

from paged_backend.engine import Engine
from paged_backend.errors import EngineDead, InvalidArgument
from paged_backend.intake import Prompt, Spread, spread
from paged_backend.outputs import Whole, failed
from paged_backend.request import OutputCallback, Request, RequestOptions, RequestOutput, SamplingParams
from paged_backend.stats import EngineStats

logger = logging.getLogger(__name__)


class SharedEngine:
    """An engine whose callers step it themselves: one of the threads that wait does so for all of them.

    So a program with one thread pays for no other, and threads that call at once are batched together. Every accepted
    request gets exactly one last output (`finish_reason` set), whatever happens to the engine.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._callbacks: dict[str, OutputCallback] = {}
        self._arrived: list[Request] = []
        self._aborted: list[str] = []
        self._outputs: deque[RequestOutput] = deque()
        """Not delivered yet."""
        self._stepping = self._closing = self._closed = self._resetting = False
        self._state = threading.Condition()  # guards all of the above; not held during a step

    @property
    def error(self) -> Exception | None:
        """What killed the engine; None while it serves."""
        return self.engine.error

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        on_output: OutputCallback,
        request_id: str | None = None,
    ) -> str:
        """Accept a request and return its id; it advances while some thread is in `run_until`.

        `on_output` is called on that thread with what is new; it must be quick and must not raise. Raises
        `InvalidArgument`, `Overloaded` or `EngineDead` here, with nothing accepted.
        """
        request = self.engine.make_request(prompt, params, options, request_id)
        with self._state:
            if self._closing or self.error is not None:
                raise EngineDead(f"the engine has stopped: {self.error or 'it was closed'}")
            self.engine.check_room(len(self._arrived))
            if request.request_id in self._callbacks:
                raise InvalidArgument("request_id", request.request_id, "is in use by a request that has not ended")
            self._callbacks[request.request_id] = on_output
            self._arrived.append(request)
            self._state.notify_all()
        return request.request_id

    def abort(self, request_id: str) -> None:
        """End a request at the next step, with finish reason "abort". Unknown and ended ids are ignored."""
        with self._state:
            self._aborted.append(request_id)
            self._state.notify_all()

    def run_until(self, done: Callable[[], bool]) -> None:
        """Return when `done` holds; it is asked again after every step. Steps the engine if no other thread does.

        Raises `EngineDead` when the engine was closed and `done` can never hold.
        """
        with self._state:
            while not done():
                if self._stepping:
                    self._state.wait()
                    continue
                self._stepping = True
                try:
                    while not done():
                        if self._closed:
                            raise EngineDead("the engine was closed")
                        self._turn()
                finally:
                    self._stepping = False
                    self._state.notify_all()

    def generate(
        self, prompts: Sequence[Prompt], params: Spread = None, options: RequestOptions | None = None
    ) -> list[RequestOutput]:
        """Whole outputs of all prompts, in order. If one is refused, those before it are aborted, and it raises."""
        wholes: dict[str, Whole] = {}
        try:
            for prompt, one in zip(prompts, spread(params, prompts), strict=True):
                whole = Whole()
                wholes[self.submit(prompt, one, options, on_output=whole.append)] = whole
            self.run_until(lambda: all(whole.finished for whole in wholes.values()))
        except BaseException:
            for request_id in wholes:
                self.abort(request_id)
            self.run_until(lambda: self._callbacks.keys().isdisjoint(wholes))
            raise
        return [whole.joined() for whole in wholes.values()]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, options: RequestOptions | None = None
    ) -> Iterator[RequestOutput]:
        """Outputs of one prompt as they come. Leaving the iterator early aborts the request."""
        outputs: deque[RequestOutput] = deque()
        request_id = self.submit(prompt, params, options, on_output=outputs.append)
        try:
            finished = False
            while not finished:
                self.run_until(lambda: bool(outputs))
                output = outputs.popleft()
                finished = output.finished
                yield output
        finally:
            self.abort(request_id)
            # Not when a step of this very thread collected an abandoned iterator; the step will see the abort.
            if not self._stepping:
                self.run_until(lambda: request_id not in self._callbacks)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes before the next step, as when the weights have changed."""
        with self._state:
            self._resetting = True

    def stats(self) -> EngineStats:
        """Numbers of the engine now."""
        return self.engine.stats()

    def close(self) -> None:
        """Abort what runs and close the engine. Idempotent; not from an output callback."""
        with self._state:
            self._closing = True
            self._state.notify_all()
        self.run_until(lambda: self._closed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _turn(self) -> None:
        """One step, or a wait for something to do. Called with the state held, and holds it again after."""
        while not (self._arrived or self._aborted or self._closing or self.engine.has_work):
            self._state.wait()
        try:
            self._step()
        except Exception as error:  # a bug of the engine's own: nobody may wait for ever
            logger.exception("the engine failed in an unforeseen way")
            self.engine.error = error
            self._outputs.extend(failed(request_id, error) for request_id in self._callbacks)
        while self._outputs:
            self._deliver(self._outputs.popleft())
        self._state.notify_all()

    def _step(self) -> None:
        arrived, self._arrived = self._arrived, []
        aborted, self._aborted = self._aborted, []
        if self._resetting:
            self.engine.reset_prefix_cache()
            self._resetting = False
        for request in arrived:
            try:
                self.engine.enqueue(request)
            except EngineDead as error:  # it died since `submit`
                self._outputs.append(failed(request.request_id, error))
        for request_id in aborted:
            self.engine.abort(request_id)
        if self._closing:
            self.engine.close()
            self._closed = True
        self._state.release()
        try:
            self._outputs.extend(self.engine.step())
        finally:
            self._state.acquire()

    def _deliver(self, output: RequestOutput) -> None:
        callback = self._callbacks.get(output.request_id)
        if callback is None:
            return  # failed above, in the middle of a step that had ended it already
        if output.finished:
            del self._callbacks[output.request_id]
        try:
            callback(output)
        except Exception:
            logger.exception("the output callback of request %s failed; it is aborted", output.request_id)
            self.engine.abort(output.request_id)
