"""The built-in policies, registered like any plugin's. `trylast`: a plugin may replace each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paged_backend.plugins import hookimpl

if TYPE_CHECKING:
    from paged_kernels.attention import AttentionBackend

    from paged_backend.config import EngineConfig
    from paged_backend.runner.loader import LoadedModel
    from paged_backend.runner.sampling import Sampler
    from paged_backend.scheduler.policy import SchedulingPolicy

# Imports are inside: the command line loads this module and must not load torch.


@hookimpl(trylast=True)
def paged_load_model(config: EngineConfig) -> LoadedModel:
    """transformers' own loader."""
    from paged_backend.runner.loader import load_model

    return load_model(config)


@hookimpl(trylast=True)
def paged_attention_backend(name: str, config: EngineConfig) -> AttentionBackend | None:
    """ "reference"."""
    from paged_kernels.attention import ReferenceAttention

    return ReferenceAttention() if name == "reference" else None


@hookimpl(trylast=True)
def paged_scheduling_policy(name: str, config: EngineConfig) -> SchedulingPolicy | None:
    """ "fcfs"."""
    from paged_backend.scheduler.policy import FirstComeFirstServed

    return FirstComeFirstServed() if name == "fcfs" else None


@hookimpl(trylast=True)
def paged_sampler(config: EngineConfig) -> Sampler:
    """The PyTorch sampler."""
    from paged_kernels.sampling import sample

    return sample
