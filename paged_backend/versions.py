"""Versions of what decides speed and memory."""

from __future__ import annotations

import importlib.metadata


def package_versions() -> dict[str, str]:
    """Installed versions, without importing the packages."""
    found = {}
    for name in ("paged-backend", "torch", "transformers", "triton", "nvidia-pytriton", "tritonclient"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
