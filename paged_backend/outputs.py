"""Making and joining outputs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from paged_backend.request import Logprob, Request, RequestOutput
from paged_backend.text.output import whole_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from paged_backend.runner.logprobs import Sampled


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
        cumulative_logprob=request.cumulative_logprob,
        arrival_time=request.arrival_time,
        scheduled_time=request.scheduled_time,
        first_token_time=request.first_token_time,
        end_time=request.end_time,
    )


def as_logprobs(sampled: Sampled, tokenizer: PreTrainedTokenizerBase | None) -> list[Logprob]:
    """The sampled token, then the likeliest ones."""
    first = Logprob(sampled.token, sampled.logprob, sampled.rank, _text(sampled.token, tokenizer))
    return [first] + [
        Logprob(token, logprob, rank, _text(token, tokenizer))
        for rank, (token, logprob) in enumerate(sampled.likeliest, start=1)
    ]


def _text(token: int, tokenizer: PreTrainedTokenizerBase | None) -> str:
    return "" if tokenizer is None else whole_text(tokenizer, [], [token], skip_special_tokens=False)


def failed(request_id: str, error: Exception) -> RequestOutput:
    """The last output of a request of which nothing else is known."""
    return RequestOutput(request_id, "", [], 0, 0, "error", error, finished=True)


class Whole:
    """A request's outputs as they come, kept as one: objects by the token would keep the garbage collector busy."""

    def __init__(self) -> None:
        self.finished = False
        self._parts: dict[int, tuple[list[str], list[int], list[list[Logprob]]]] = {}
        """Texts, tokens and log-probabilities, by sample."""
        self._last: dict[int, RequestOutput] = {}
        self._prompt_logprobs: list[list[Logprob]] | None = None

    def append(self, part: RequestOutput) -> None:
        """The next output."""
        texts, token_ids, logprobs = self._parts.setdefault(part.index, ([], [], []))
        texts.append(part.text)
        token_ids += part.token_ids
        logprobs += part.logprobs or []
        self._last[part.index] = part
        self._prompt_logprobs = self._prompt_logprobs or part.prompt_logprobs
        self.finished = part.finished

    def joined(self) -> RequestOutput:
        """One output of all; that of sample 0, with all in `samples` if there are several."""
        samples = tuple(
            dataclasses.replace(
                self._last[index],
                text="".join(texts),
                token_ids=token_ids,
                logprobs=logprobs or None,
                prompt_logprobs=self._prompt_logprobs,
                finished=True,
            )
            for index, (texts, token_ids, logprobs) in sorted(self._parts.items())
        )
        return samples[0] if len(samples) == 1 else dataclasses.replace(samples[0], samples=samples)
