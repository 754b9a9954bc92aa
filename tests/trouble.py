"""A plugin that makes an engine fail on purpose: the seed of a request says how."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from paged_backend.config import EngineConfig
from paged_backend.errors import Overloaded
from paged_backend.plugins import hookimpl
from paged_backend.request import Request

FATAL, STUCK, UNPICKLABLE, STRANGER, QUOTA, TALKATIVE, STUCK_WITH_LOCK = range(1001, 1008)
DIES_AT_START = "PAGED_BACKEND_TROUBLE_DIES"


def install(folder: Path) -> None:
    """Make the plugin one that a Python with `folder` on its path finds."""
    shutil.copy(__file__, folder / "paged_backend_trouble.py")
    information = folder / "paged_backend_trouble-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: paged-backend-trouble\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[paged_backend]\ntrouble = paged_backend_trouble\n")


class UnpicklableError(Exception):
    def __init__(self) -> None:
        super().__init__("it holds a lambda", lambda: None)


class StrangerError(OSError):
    """Of a module that the other process does not import."""


class QuotaExceeded(Overloaded):
    """Must still be told from a bug."""

    def __init__(self, tenant: str, used: int) -> None:
        super().__init__(f"{tenant} has used {used}")


@hookimpl
def paged_request_filter(request: Request) -> None:
    seed = request.params.seed
    if seed == UNPICKLABLE:
        raise UnpicklableError
    if seed == STRANGER:
        raise StrangerError("no such thing")
    if seed == TALKATIVE:
        try:
            raise KeyError("cause")
        except KeyError:
            extra = {"request_id": request.request_id, "lock": threading.Lock()}
            logging.getLogger("paged_backend_trouble").exception("%s of %r", "100 %", threading.Lock, extra=extra)
    if seed == QUOTA:
        raise QuotaExceeded("somebody", 7)


@hookimpl
def paged_request_scheduled(request: Request) -> None:
    if request.params.seed == STUCK:
        print("stuck", flush=True)
        time.sleep(1000)
    if request.params.seed == STUCK_WITH_LOCK:
        ctypes.PyDLL(None).sleep(1000)  # the interpreter's, which no other thread gets then


@hookimpl
def paged_logits_processor(config: EngineConfig) -> Any:
    if os.environ.get(DIES_AT_START):
        os._exit(7)

    def process(logits: Any, requests: Any) -> None:
        if any(request.params.seed == FATAL for request in requests):
            raise MemoryError("no memory is left on the device")

    return process
