"""Every policy of the engine is a hook. Built-ins are plugins of these hooks like anyone else's.

A plugin is a module or object with functions marked `paged_backend.plugins.hookimpl`. It is found through the
entry-point group `paged_backend`, or passed as `Engine(..., plugins=[...])`. Factories are asked once, at start;
a factory returns None for a name that is not its own. Observers run on the engine thread and must be quick; one that
raises is logged and the engine goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer
    from paged_kernels.attention import AttentionBackend

    from paged_backend.config import EngineConfig
    from paged_backend.kv_cache.eviction import EvictionPolicy
    from paged_backend.request import Request
    from paged_backend.runner.loader import LoadedModel
    from paged_backend.runner.sampling import LogitsProcessor, Sampler
    from paged_backend.scheduler.policy import SchedulingPolicy
    from paged_backend.scheduler.preemption import PreemptionPolicy
    from paged_backend.simulate.router import Router
    from paged_backend.stats import StepStats
    from paged_backend.text.grammar import GrammarBackend

hookspec = pluggy.HookspecMarker("paged_backend")


@hookspec(firstresult=True)
def paged_load_model(config: EngineConfig) -> LoadedModel | None:
    """Load `config.model`, transform its weights if wanted, and return it on its device in eval mode."""


@hookspec(firstresult=True)
def paged_attention_backend(name: str, config: EngineConfig) -> AttentionBackend | None:
    """Make the attention backend called `name`."""


@hookspec(firstresult=True)
def paged_scheduling_policy(name: str, config: EngineConfig) -> SchedulingPolicy | None:
    """Make the scheduling policy called `name`: it orders the requests, and says who makes room for whom."""


@hookspec(firstresult=True)
def paged_preemption_policy(name: str, config: EngineConfig) -> PreemptionPolicy | None:
    """Make the preemption policy called `name`: whom to preempt, and whether to swap or compute again."""


@hookspec(firstresult=True)
def paged_eviction_policy(name: str, config: EngineConfig) -> EvictionPolicy | None:
    """Make the eviction policy called `name`: which cached block goes first. Asked once for each tier of blocks."""


@hookspec(firstresult=True)
def paged_grammar_backend(name: str, config: EngineConfig) -> GrammarBackend | None:
    """Make the grammar backend called `name`: it says which tokens `structured_outputs` allow next."""


@hookspec(firstresult=True)
def paged_router(name: str, config: EngineConfig) -> Router | None:
    """Make the router called `name`: which replica a request goes to. `paged-backend simulate` asks it."""


@hookspec(firstresult=True)
def paged_sampler(config: EngineConfig) -> Sampler | None:
    """Make the sampler, which turns the logits of a step into one token a row."""


@hookspec
def paged_logits_processor(config: EngineConfig) -> LogitsProcessor | None:
    """Make a processor that edits the logits of every step before sampling, in place."""


@hookspec
def paged_request_filter(request: Request) -> None:
    """Refuse a request (quota, authentication) by raising `InvalidArgument` or `Overloaded`.

    Called in the caller's thread, before the request is accepted.
    """


@hookspec
def paged_request_arrived(request: Request) -> None:
    """Observe a request entering the waiting queue."""


@hookspec
def paged_request_scheduled(request: Request) -> None:
    """Observe a request getting a slot: the first time, and again after each preemption."""


@hookspec
def paged_request_preempted(request: Request) -> None:
    """Observe a running request losing its blocks and going back to the queue."""


@hookspec
def paged_request_first_token(request: Request) -> None:
    """Observe a request's first output token."""


@hookspec
def paged_request_ended(request: Request) -> None:
    """Observe the end of a request: finished, aborted or failed."""


@hookspec
def paged_step_ended(stats: StepStats) -> None:
    """Observe a step of the engine, after its tokens are committed."""


@hookspec
def paged_cli_commands(app: typer.Typer) -> None:
    """Add commands to the `paged-backend` command line."""
