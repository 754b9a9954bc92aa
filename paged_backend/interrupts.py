"""Ctrl-C, only where it can be answered."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class HeldBack:
    """A context in which KeyboardInterrupt waits: for the end of it, or for a part of it that lets it in.

    So no change of state is left half made. Only Python's own handler, on the main thread, is held back; nobody else
    is interrupted, or wants to be.
    """

    def __enter__(self) -> HeldBack:
        self._came = self._open = False
        self._holds = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._holds:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._holds:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._raise()

    @contextlib.contextmanager
    def let_in(self) -> Iterator[None]:
        """Inside, an interrupt is raised at once, as is one that has been waiting."""
        self._open = True
        try:
            self._raise()
            yield
        finally:
            self._open = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        if self._open:
            self._raise()

    def _raise(self) -> None:
        if self._came:
            self._came = False
            raise KeyboardInterrupt
