"""Making and joining outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from paged_backend.request import Request, RequestOutput


def output_of(request: Request, token_ids: list[int], text: str, *, finished: bool) -> RequestOutput:
    """The output that brings these new tokens and text of a request."""
    return RequestOutput(
        request_id=request.request_id,
        text=text,
        token_ids=token_ids,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=request.num_output_tokens,
        finish_reason=request.finish_reason,
        error=request.error,
        finished=finished,
        index=request.index,
        num_cached_tokens=request.num_cached_tokens or 0,
        arrival_time=request.arrival_time,
        first_token_time=request.first_token_time,
        end_time=request.end_time,
    )


def failed(request_id: str, error: Exception) -> RequestOutput:
    """The last output of a request of which nothing else is known."""
    return RequestOutput(request_id, "", [], 0, 0, "error", error, finished=True)


def join(parts: Sequence[RequestOutput]) -> RequestOutput:
    """One output of all a request's outputs; that of its sample 0, with all in `samples` if there are several."""
    by_index: dict[int, list[RequestOutput]] = {}
    for part in parts:
        by_index.setdefault(part.index, []).append(part)
    samples = tuple(
        dataclasses.replace(
            of_one[-1],
            text="".join(part.text for part in of_one),
            token_ids=[token for part in of_one for token in part.token_ids],
            finished=True,
        )
        for _, of_one in sorted(by_index.items())
    )
    return samples[0] if len(samples) == 1 else dataclasses.replace(samples[0], samples=samples)
