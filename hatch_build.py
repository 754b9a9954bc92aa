"""Compiles the CPU kernels when the package is built or installed; without a compiler, it is installed without them."""

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path("kernels", "paged_kernels", "cpu")


class CpuKernels(BuildHookInterface):
    """The wheel is one of a platform if it holds compiled kernels, else of any."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling; `version` is "standard" or "editable"."""
        spec = importlib.util.spec_from_file_location("library", Path(self.root, _FOLDER, "library.py"))
        assert spec is not None
        assert spec.loader is not None
        library = importlib.util.module_from_spec(spec)  # not the package: that needs torch
        spec.loader.exec_module(library)
        try:
            built = library.build()
        except library.CannotBuild as reason:
            self.app.display_warning(f"the CPU kernels are left out: {reason}")
            return
        build_data["artifacts"] += [str(_FOLDER / path.name) for path in built]
        if version == "standard":
            build_data["pure_python"], build_data["tag"] = False, "py3-none-linux_x86_64"
