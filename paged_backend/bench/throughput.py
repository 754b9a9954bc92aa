"""Tokens per second of a whole workload, on our engine and on a peer, run in turns."""

from __future__ import annotations

import datetime
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from paged_backend.bench import machine
from paged_backend.bench.anchors import anchor
from paged_backend.bench.result import Series, ThroughputResult
from paged_backend.bench.shapes import make_engine
from paged_backend.bench.workloads import Workload
from paged_backend.config import EngineConfig
from paged_backend.request import SamplingParams


class System(Protocol):
    """Something that can serve a workload."""

    name: str
    load_seconds: float
    settings: dict[str, object]

    def warm_up(self, workload: Workload) -> None:
        """What need not be timed."""
        ...

    def reset(self) -> None:
        """Forget what earlier runs left behind; called before each that is timed."""
        ...

    def run(self, workload: Workload) -> None:
        """Every request of the workload, whole; raises if one is not."""
        ...


class OurEngine:
    """The engine of this package."""

    name = "paged-backend"

    def __init__(self, config: EngineConfig) -> None:
        start = time.perf_counter()
        self.engine = make_engine(config)
        self.load_seconds = time.perf_counter() - start
        self.settings: dict[str, object] = config.model_dump(exclude_defaults=True, exclude={"model"})

    def warm_up(self, workload: Workload) -> None:
        """Run the workload once."""
        self.run(workload)

    def reset(self) -> None:
        """Empty the prefix cache."""
        self.engine.reset_prefix_cache()

    def run(self, workload: Workload) -> None:
        """All requests at once."""
        sampling = {"temperature": workload.temperature, "top_p": workload.top_p, "ignore_eos": True}
        params = [SamplingParams(max_tokens=n, **sampling) for _, n in workload.requests]
        outputs = self.engine.generate([prompt for prompt, _ in workload.requests], params)
        for output, (_, wanted) in zip(outputs, workload.requests, strict=True):
            if output.error is not None:
                raise output.error
            if output.num_output_tokens != wanted:
                raise RuntimeError(f"{output.request_id} made {output.num_output_tokens} of {wanted} tokens")


def measure(
    systems: list[System], workload: Workload, repeat: int, report: Callable[[str], None] = lambda line: None
) -> list[Series]:
    """Warm every system up, then time them in turns, `repeat` times each."""
    every = []
    for system in systems:
        report(f"{system.name}: warming up")
        system.warm_up(workload)
        every.append(Series(system.name, system.settings, system.load_seconds, workload.counted_tokens))
    for turn in range(repeat):
        for system, series in zip(systems, every, strict=True):
            report(f"{system.name}: run {turn + 1} of {repeat}")
            gc.collect()
            system.reset()
            start = time.perf_counter()
            system.run(workload)
            series.seconds.append(time.perf_counter() - start)
    return every


def compare(
    config: EngineConfig,
    workload: Workload,
    systems: list[System],
    repeat: int,
    report: Callable[[str], None] = lambda line: None,
) -> ThroughputResult:
    """`measure`, with all that is needed to know what the figures mean."""
    series = measure(systems, workload, repeat, report)
    name, host = config.require_model(), machine.describe()
    as_the_anchors = config.device != "cpu" and config.dtype in ("auto", "bfloat16") and not workload.temperature
    return ThroughputResult(
        workload=workload.name,
        num_requests=len(workload.requests),
        temperature=workload.temperature,
        top_p=workload.top_p,
        model=Path(name).name if Path(name).exists() else name,
        dtype=config.dtype,
        device=config.device,
        unit=workload.unit,
        measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=host,
        anchor=anchor(workload.name, name, host.gpus[0]) if as_the_anchors and host.gpus else None,
        series=series,
    )
