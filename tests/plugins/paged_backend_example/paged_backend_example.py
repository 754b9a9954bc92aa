"""A scheduling policy and a request observer."""

from __future__ import annotations

from paged_backend import EngineConfig
from paged_backend.plugins import hookimpl
from paged_backend.request import Request
from paged_backend.scheduler.policy import SchedulingPolicy

events: list[tuple[str, str]] = []
"""What happened, and to which request."""


class ShortestPrompt(SchedulingPolicy):
    """The shortest prompt runs first."""

    def key(self, request: Request) -> int:
        return request.num_prompt_tokens


@hookimpl
def paged_scheduling_policy(name: str, config: EngineConfig) -> ShortestPrompt | None:
    return ShortestPrompt() if name == "shortest-prompt" else None


@hookimpl
def paged_request_arrived(request: Request) -> None:
    events.append(("arrived", request.request_id))


@hookimpl
def paged_request_scheduled(request: Request) -> None:
    events.append(("scheduled", request.request_id))


@hookimpl
def paged_request_first_token(request: Request) -> None:
    events.append(("first token", request.request_id))


@hookimpl
def paged_request_ended(request: Request) -> None:
    events.append((request.status.value, request.request_id))
