"""The built-in policies, registered like any plugin's. `trylast`: a plugin may replace each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paged_backend.plugins import hookimpl

if TYPE_CHECKING:
    from paged_kernels.attention import AttentionBackend

    from paged_backend.config import EngineConfig
    from paged_backend.kv_cache.eviction import EvictionPolicy
    from paged_backend.runner.loader import LoadedModel
    from paged_backend.runner.sampling import Sampler
    from paged_backend.scheduler.policy import SchedulingPolicy
    from paged_backend.scheduler.preemption import PreemptionPolicy
    from paged_backend.simulate.router import Router
    from paged_backend.text.grammar import GrammarBackend

NAMES = {
    "paged_attention_backend": ("reference", "cpu", "triton"),
    "paged_scheduling_policy": ("fcfs", "priority", "shortest-remaining", "fair-share"),
    "paged_preemption_policy": ("auto", "swap", "recompute"),
    "paged_eviction_policy": ("lru",),
    "paged_grammar_backend": ("llguidance",),
    "paged_router": ("round-robin", "least-loaded", "prefix-affinity"),
}
"""What each factory here makes."""

# Imports are inside: the command line loads this module and must not load torch.


@hookimpl(trylast=True)
def paged_load_model(config: EngineConfig) -> LoadedModel:
    """transformers' own loader."""
    from paged_backend.runner.loader import load_model

    return load_model(config)


@hookimpl(trylast=True)
def paged_attention_backend(name: str, config: EngineConfig) -> AttentionBackend | None:
    """ "reference", "cpu" and "triton"."""
    match name:
        case "reference":
            from paged_kernels.attention import ReferenceAttention

            return ReferenceAttention()
        case "cpu":
            from paged_kernels.cpu.attention import CpuAttention

            return CpuAttention()
        case "triton":
            from paged_kernels.gpu.attention import TritonAttention

            return TritonAttention()
    return None


@hookimpl(trylast=True)
def paged_scheduling_policy(name: str, config: EngineConfig) -> SchedulingPolicy | None:
    """ "fcfs", "priority", "shortest-remaining" and "fair-share"."""
    from paged_backend.scheduler.policy import FairShare, Priority, SchedulingPolicy, ShortestRemaining

    match name:
        case "fcfs":
            return SchedulingPolicy()
        case "priority":
            return Priority(config.ageing_seconds)
        case "shortest-remaining":
            return ShortestRemaining(config.ageing_tokens_per_second)
        case "fair-share":
            return FairShare()
    return None


@hookimpl(trylast=True)
def paged_preemption_policy(name: str, config: EngineConfig) -> PreemptionPolicy | None:
    """ "auto", "swap" and "recompute"."""
    from paged_backend.scheduler.preemption import LowestRanked

    swaps = {"auto": None, "swap": True, "recompute": False}
    return LowestRanked(swaps[name]) if name in swaps else None


@hookimpl(trylast=True)
def paged_eviction_policy(name: str, config: EngineConfig) -> EvictionPolicy | None:
    """ "lru"."""
    from paged_backend.kv_cache.eviction import LeastRecentlyUsed

    return LeastRecentlyUsed() if name == "lru" else None


@hookimpl(trylast=True)
def paged_grammar_backend(name: str, config: EngineConfig) -> GrammarBackend | None:
    """ "llguidance", which "auto" is too."""
    from paged_backend.text.guidance import LLGuidance

    return LLGuidance if name in ("auto", "llguidance") else None


@hookimpl(trylast=True)
def paged_router(name: str, config: EngineConfig) -> Router | None:
    """ "round-robin", "least-loaded" and "prefix-affinity"."""
    from paged_backend.simulate.router import LeastLoaded, PrefixAffinity, RoundRobin

    match name:
        case "round-robin":
            return RoundRobin()
        case "least-loaded":
            return LeastLoaded()
        case "prefix-affinity":
            return PrefixAffinity()
    return None


@hookimpl(trylast=True)
def paged_sampler(config: EngineConfig) -> Sampler:
    """The PyTorch sampler."""
    from paged_kernels.sampling import sample

    return sample
