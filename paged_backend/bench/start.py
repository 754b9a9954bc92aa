"""How long an engine takes until it can serve: the first time on a machine, and the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

from paged_backend.config import EngineConfig
from paged_backend.errors import PagedBackendError


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds since the process was started."""

    kind: Literal["cold", "warm"]
    """Cold: no kernel has been compiled before, and nothing measured. The files of the weights are as they are."""
    imported: float
    """Python runs, torch and the engine's modules are there."""
    stages: dict[str, float]
    """Seconds of each stage of making the engine: `Engine.start_seconds`."""
    ready: float
    """The engine is made."""
    first_token: float
    """A first request of one token has ended."""


def measure(config: EngineConfig, repeat: int) -> list[Start]:
    """Start a process with an engine of `config`, a local model, cold and then warm, `repeat` times.

    Raises `PagedBackendError` with what the process said if it fails.
    """
    starts = []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory(prefix="paged-backend-start-") as folder:
            caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "PAGED_BACKEND_CACHE": folder}
            starts += [_start("cold", config, caches), _start("warm", config, caches)]
    return starts


def _start(kind: Literal["cold", "warm"], config: EngineConfig, caches: dict[str, str]) -> Start:
    command = [sys.executable, "-m", __name__, config.model_dump_json(exclude_defaults=True), str(time.monotonic())]
    done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PagedBackendError(f"the process ended with code {done.returncode}: {done.stderr.strip()[-2000:]}")
    return Start(kind, *json.loads(done.stdout.splitlines()[-1]))


def _serve_one(config: EngineConfig, began: float) -> list[float | dict[str, float]]:
    from paged_backend.engine import Engine
    from paged_backend.request import SamplingParams

    marks: list[float | dict[str, float]] = [time.monotonic() - began]
    engine = Engine(config)
    marks.append(engine.start_seconds)
    marks.append(time.monotonic() - began)
    (output,) = engine.generate([[1]], SamplingParams(max_tokens=1))
    if output.error is not None:
        raise output.error
    marks.append(time.monotonic() - began)
    engine.close()
    return marks


if __name__ == "__main__":
    print(json.dumps(_serve_one(EngineConfig.model_validate_json(sys.argv[1]), float(sys.argv[2]))))
