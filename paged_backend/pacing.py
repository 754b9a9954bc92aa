"""How an engine shares cores with those who send its tokens, where the same compute and send them."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence

from paged_backend.request import RequestOutput

_ROUND_SECONDS = 0.001
"""Of one core, about, that it takes from the engine to send something: threads of four processes wake up ..."""
_RESPONSE_SECONDS = 0.0007
"""... and that each response takes: 0.3 ms of server, backend and client, while a thread of the engine may have lost
its core within a task that the others wait for (docs/performance.md)."""
_LONGEST_SECONDS = 1.0
_LONGEST_STEPS = 16


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def let_compute(process: int) -> None:
    """Have a process's threads, and those they will start, not take a core from one that computes when they wake up.

    An engine's threads wait for the one that has lost its core. Under SCHED_BATCH (sched(7)) a thread waits for the end
    of the other's turn, some milliseconds at most; all still get equal shares. Nothing happens where it cannot be set.
    """
    with contextlib.suppress(OSError, AttributeError):  # it has ended, is another user's, or this is not Linux
        for thread in os.listdir(f"/proc/{process}/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setscheduler(int(thread), os.SCHED_BATCH, os.sched_param(0))


class Pace:
    """Keeps outputs back, so that responses take a small part of the cores' time.

    A request's first and last outputs never wait, nor does any longer than a second or, if these take longer, 16 steps.
    """

    def __init__(self, share: float) -> None:
        """`share` of the cores' time is for responses; with 1, nothing waits."""
        self._factor = 1 / share / num_cores() if share < 1 else 0.0
        self._held: dict[str, list[RequestOutput]] = {}
        """Of all requests that have begun and not ended."""
        self._due = self._latest = 0.0
        self._steps = 0
        """Since the last time that those which waited were sent."""

    def next(self, outputs: Sequence[RequestOutput]) -> list[RequestOutput]:
        """What to send now that a step has brought these, in order for each request."""
        sent = []
        for output in outputs:
            held = self._held.get(output.request_id)
            if held is not None:
                held.append(output)
            if held is None or output.finished:
                sent += held or [output]
                self._held[output.request_id] = []
            if output.finished:
                del self._held[output.request_id]
        self._steps += 1
        now = time.monotonic()
        if now >= self._due or (now >= self._latest and self._steps >= _LONGEST_STEPS):
            waiting = [held for held in self._held.values() if held]
            for held in waiting:
                sent += held
                held.clear()
            if waiting:
                seconds = _ROUND_SECONDS + len(waiting) * _RESPONSE_SECONDS
                self._due, self._latest = now + seconds * self._factor, now + _LONGEST_SECONDS
                self._steps = 0
        return sent
