"""Programmatic dependent launch: a kernel starts while the one before it drains.

A kernel that takes part calls `gdc_launch_dependents()` first, so that the next one may start as soon as all of its
programs run, and `gdc_wait()` before it touches anything that earlier kernels of its step write or read, in every
program: that returns once the kernel before has completed, which waited for the one before it in turn. Before the wait
it may read weights, and what the device wrote before the last ordinary kernel of the stream. A kernel that calls
`gdc_launch_dependents()` only after its own wait lets the next one read all that came before itself without waiting.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def supports_dependent_launch(device: torch.device) -> bool:
    """Whether kernels on `device` may be launched so (compute capability 9 and up)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
