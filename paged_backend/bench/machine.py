"""What a figure was measured on; a figure without this cannot be compared."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from paged_backend.pacing import num_cores
from paged_backend.versions import package_versions


@dataclass(frozen=True, slots=True)
class Machine:
    """Hardware and software of this process."""

    cpu: str
    cores: int
    """Usable by this process."""
    threads: int
    """torch's."""
    gpus: list[str]
    os: str
    python: str
    packages: dict[str, str]
    """Installed versions of this package and of those that decide its speed."""
    commit: str | None
    """None unless run from a git checkout, or told by `$PAGED_BACKEND_COMMIT` (a container image without git)."""
    dirty: bool | None
    """Whether the checkout has changes that are not committed."""


def describe() -> Machine:
    """This machine. Imports torch to ask for GPUs."""
    import torch

    commit, dirty = _checkout()
    return Machine(
        cpu=_cpu(),
        cores=num_cores(),
        threads=torch.get_num_threads(),
        gpus=[torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        os=platform.platform(aliased=True),
        python=platform.python_version(),
        packages=package_versions(),
        commit=commit,
        dirty=dirty,
    )


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _checkout() -> tuple[str | None, bool | None]:
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "machine.py")  # an installed copy may lie inside some other checkout
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain"))
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("PAGED_BACKEND_COMMIT"), None
