"""The tritonserver that this process, a stub of its Python backend, belongs to."""

from __future__ import annotations

import itertools
import os
import pathlib
import threading
import time

_LOOK_SECONDS = 0.5


def end_with_server() -> None:
    """End this process soon after its parent, from a thread: the stub itself does not when it waits for an answer.

    Nor does the thread when the stub waits with the interpreter's lock held; then `EngineProcess` sees to it.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="paged-watchdog", daemon=True).start()


def unloads_models() -> bool:
    """Whether the server loads and unloads models when asked. Any other one must not be asked: 24.10 refuses, and
    crashes at one of the next requests.
    """
    try:
        command = pathlib.Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return False
    mode = "--model-control-mode"
    return f"{mode}=explicit" in command or (mode, "explicit") in itertools.pairwise(command)


def visible_devices(kind: str, device_id: str) -> dict[str, str]:
    """Environment variables of an engine for a model instance of this kind: of GPU, it sees that one alone."""
    if kind != "GPU":
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # device ids count what the server sees
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[int(device_id)] if visible else device_id}
