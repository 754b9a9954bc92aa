"""What all pictures share. Needs matplotlib (`pip install paged-backend[bench]`)."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from paged_backend.errors import InvalidArgument

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID = "#333333", "#e8e8e8"


def require_matplotlib(field: str) -> None:
    """Raise `InvalidArgument` for `field` where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidArgument(field, "matplotlib", "is not installed; pip install 'paged-backend[bench]'")


def figure(width: float, height: float, title: str) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # the object interface: no display, no global state

    made = Figure(figsize=(width, height), layout="constrained")
    made.suptitle(title, fontsize=10, color=INK)
    return made


def plain(axes: Axes, title: str, x: str, y: str) -> None:
    """Title and labels, and no more ink than needed."""
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def save(made: Figure, path: Path) -> None:
    """Write it as PNG, the same bytes for the same picture."""
    made.savefig(path, dpi=150, format="png", metadata={"Software": None})
