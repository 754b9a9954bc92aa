"""Making and joining outputs."""

from __future__ import annotations

import dataclasses

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
        scheduled_time=request.scheduled_time,
        first_token_time=request.first_token_time,
        end_time=request.end_time,
    )


def failed(request_id: str, error: Exception) -> RequestOutput:
    """The last output of a request of which nothing else is known."""
    return RequestOutput(request_id, "", [], 0, 0, "error", error, finished=True)


class Whole:
    """A request's outputs as they come, kept as one: objects by the token would keep the garbage collector busy."""

    def __init__(self) -> None:
        self.finished = False
        self._parts: dict[int, tuple[list[str], list[int]]] = {}
        """Texts and tokens, by sample."""
        self._last: dict[int, RequestOutput] = {}

    def append(self, part: RequestOutput) -> None:
        """The next output."""
        texts, token_ids = self._parts.setdefault(part.index, ([], []))
        texts.append(part.text)
        token_ids += part.token_ids
        self._last[part.index] = part
        self.finished = part.finished

    def joined(self) -> RequestOutput:
        """One output of all; that of sample 0, with all in `samples` if there are several."""
        samples = tuple(
            dataclasses.replace(self._last[index], text="".join(texts), token_ids=token_ids, finished=True)
            for index, (texts, token_ids) in sorted(self._parts.items())
        )
        return samples[0] if len(samples) == 1 else dataclasses.replace(samples[0], samples=samples)
