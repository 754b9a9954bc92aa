"""The compiled CPU kernels: building them, and loading those for the machine's instructions.

`python -m paged_kernels.cpu.library` builds them beside the source; so does installing the package.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
SOURCES = tuple(_FOLDER / f"{name}.cpp" for name in ("attention", "decoder", "layers", "linear", "int8"))
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
VARIANTS: dict[str, tuple[str, ...]] = {
    "amx": ("avx2", "fma", *_AVX512, "avx512_bf16", "amx_tile", "amx_bf16"),
    "avx512_bf16": ("avx2", "fma", *_AVX512, "avx512_bf16"),
    "avx512": ("avx2", "fma", *_AVX512),
    "avx2": ("avx2", "fma"),
}
"""What each needs of the CPU, in the words of /proc/cpuinfo; the best comes first."""
# GCC finds its own headers' _mm512_undefined_ps() uninitialised.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-maybe-uninitialized")


class CannotBuild(RuntimeError):
    """There is no compiler, or it failed; the message says which."""


def build(folder: Path = _FOLDER, variants: Sequence[str] = tuple(VARIANTS), flags: Sequence[str] = ()) -> list[Path]:
    """Compile the variants into `folder`; returns the libraries. Raises `CannotBuild`."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise CannotBuild(f"the kernels are for Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise CannotBuild("no C++ compiler: neither CXX is set, nor is there g++ or clang++")
    known = [variant for variant in variants if _knows(compiler, variant)]
    if not known:
        raise CannotBuild(f"{compiler} knows the instructions of none of {', '.join(variants)}")
    with ThreadPoolExecutor() as threads:
        return list(threads.map(lambda variant: _compile(compiler, variant, folder, flags), known))


def instructions(variant: str) -> list[str]:
    """The compiler's options for a variant."""
    return [f"-m{name.replace('amx_', 'amx-').replace('_', '')}" for name in VARIANTS[variant]]


def _knows(compiler: str, variant: str) -> bool:
    command = [*compiler.split(), *instructions(variant), "-E", "-x", "c++", os.devnull]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError as error:
        raise CannotBuild(f"{compiler}: {error}") from None


def _compile(compiler: str, variant: str, folder: Path, flags: Sequence[str]) -> Path:
    library = folder / f"kernels_{variant}.so"
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        linked = Path(scratch, library.name)
        objects = {source: Path(scratch, f"{source.stem}.o") for source in SOURCES}
        compile_ = [*compiler.split(), *_FLAGS, "-fopenmp", *instructions(variant), *flags]
        # Linked without an OpenMP library: it shall use the one that torch has loaded, and that one's threads.
        for command in (
            *([*compile_, "-c", str(source), "-o", str(compiled)] for source, compiled in objects.items()),
            [*compiler.split(), "-shared", *flags, *map(str, objects.values()), "-o", str(linked)],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                raise CannotBuild(f"{compiler}: {error}") from None
            if done.returncode:
                raise CannotBuild(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        linked.replace(library)
    return library


@functools.cache
def load(variant: str | None = None) -> ctypes.CDLL | None:
    """The library for `variant`, or the best for this CPU; None, with one warning, if there is none."""
    wanted = [variant] if variant else [name for name, needs in VARIANTS.items() if features().issuperset(needs)]
    for name in wanted:
        path = _FOLDER / f"kernels_{name}.so"
        if path.exists() and ("amx_tile" not in VARIANTS[name] or _may_use_tiles()):
            return ctypes.CDLL(str(path))
    logger.warning(
        "the CPU kernels are not built for this machine (%s); the slower PyTorch ones are used. "
        "`python -m paged_kernels.cpu.library` builds them, where there is a C++ compiler",
        ", ".join(wanted) or "it has no AVX2",
    )
    return None


def _may_use_tiles() -> bool:
    """Ask Linux for the registers of AMX, which a process does not have unless it asks."""
    arch_prctl, request_permission, tile_data = map(ctypes.c_long, (158, 0x1023, 18))
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def features() -> frozenset[str]:
    """What the CPU can do, as /proc/cpuinfo says it."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return frozenset()
    return frozenset(flags.partition(":")[2].split())


if __name__ == "__main__":
    try:
        print(*build(), sep="\n")
    except CannotBuild as error:
        sys.exit(f"error: {error}")
