"""The compiled kernels under the compiler's sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from paged_kernels.cpu import library

VARIANTS = [name for name, needs in library.VARIANTS.items() if library.features().issuperset(needs)]
SANITIZERS = {
    "address,undefined": ("cpu_steps.cpp", library.SOURCES, "60 steps\n"),
    "thread": ("cpu_team.cpp", (), "20 teams\n"),
}


@pytest.mark.skipif(not VARIANTS, reason="nothing is compiled for this machine's instructions")
@pytest.mark.parametrize("sanitizers", SANITIZERS)
def test_nothing_undefined(sanitizers: str, tmp_path: Path) -> None:
    """Random steps in exactly sized buffers; and threads that share work."""
    name, sources, said = SANITIZERS[sanitizers]
    folder, program = library.SOURCES[0].parent, tmp_path / "program"
    checks = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    flags = ["-std=c++17", "-O1", "-g", "-fopenmp", f"-I{folder}", *checks]
    made_of = [str(Path(__file__).with_name(name)), *map(str, sources)]
    command = ["g++", *flags, *library.instructions(VARIANTS[0]), *made_of, "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    ran = subprocess.run([str(program)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout == said
