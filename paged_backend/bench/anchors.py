"""Figures to compare with: vLLM 0.26.0 on one H100 80GB, same workloads, measured by us.

FlashAttention 3, compiled, CUDA graphs, asynchronous scheduling, prefix cache on; random bfloat16 weights, greedy.
"""

from __future__ import annotations

from dataclasses import dataclass

GPU = "NVIDIA H100 80GB HBM3"
_RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "random-1b": {
        "offline256": (25_600, 28_200),
        "bs1": (1000 / 1.69,),  # measured as 1.69 ms a token
        "bs32": (11_900,),
        "shared64": (14_300, 17_000),
        "long8": (1_366,),
        "prefill32": (247_000,),
    },
    "random-8b": {
        "offline256": (8_390,),
        "bs1": (1000 / 6.56,),
        "bs32": (2_950,),
        "shared64": (5_600,),
        "long8": (297,),
        "prefill32": (42_600,),
    },
}


@dataclass(frozen=True, slots=True)
class Anchor:
    """What another system reaches; tokens per second as the workload counts them."""

    system: str
    lowest: float
    highest: float
    """Of several runs."""


def anchor(workload: str, model: str, gpu: str) -> Anchor | None:
    """The figure for a workload and a model of random weights, if `gpu` is of the kind it was measured on."""
    rates = _RATES.get(model, {}).get(workload)
    if rates is None or gpu != GPU:
        return None
    return Anchor("vLLM 0.26.0", min(rates), max(rates))
