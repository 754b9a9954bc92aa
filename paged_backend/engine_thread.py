"""A thread of its own for an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from paged_backend.engine import Engine
from paged_backend.shared_engine import SharedEngine


class EngineThread(SharedEngine):
    """A shared engine that a daemon thread steps, so that nobody has to wait for it to advance.

    `make_engine` is called on that thread too: on a CPU, OpenMP keeps a pool of threads for each thread that ever
    computed, and two pools on the same cores slow each other down. Raises what `make_engine` raises.
    """

    def __init__(self, make_engine: Callable[[], Engine]) -> None:
        made: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(make_engine, made), name="paged-backend-engine", daemon=True
        )
        self._thread.start()
        made.result()

    def close(self) -> None:
        """Abort what runs, close the engine and end the thread. Idempotent; not from an output callback."""
        super().close()
        self._thread.join()

    def _run(self, make_engine: Callable[[], Engine], made: Future[None]) -> None:
        try:
            super().__init__(make_engine())
        except BaseException as error:
            made.set_exception(error)
            return
        made.set_result(None)
        self.run_until(lambda: self._closed)
