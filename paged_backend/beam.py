"""Beam search of one request: which beams go on, which are finished, and when to stop.

Scores, order and stopping are those of transformers' `generate(num_beams=...)`; float32 throughout, as there.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

import numpy as np

from paged_backend.request import FinishReason, Request, RequestOutput
from paged_backend.scheduler.scheduler import Scheduler
from paged_backend.text.output import whole_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Candidates = list[tuple[int, float]]
"""Token ids and their log-probabilities, the likeliest first."""


def num_candidates(request: Request) -> int:
    """Of a beam: so many that `beam_width` of them go on, whichever stop tokens are among them. As in transformers."""
    return max(2, 1 + len(request.stop_token_ids)) * request.params.beam_width


class BeamSearch:
    """The state of one search. Each beam is a request of its own to the scheduler, which forks and frees its blocks."""

    def __init__(self, first: Request) -> None:
        """`first` is the only beam until it has been continued for the first time."""
        self.params = first.params
        self.beams: list[Request] = [first]
        """The beams that are continued, the likeliest first."""
        self.finished: list[tuple[float, list[int]]] = []
        """Scores and tokens of at most `beam_width` finished outputs, the best first."""
        self._scores = [np.float32(0.0)]
        self._candidates: dict[Request, Candidates] = {}

    def offer(self, beam: Request, candidates: Candidates) -> bool:
        """The next tokens of one beam; True when those of all are there, and `advance` may be called."""
        self._candidates[beam] = candidates
        return len(self._candidates) == len(self.beams)

    def advance(self) -> list[tuple[int, int]]:
        """The next beams, as (index in `beams` of the one continued, token); [] when the search has ended."""
        width, first = self.params.beam_width, self.beams[0]
        continued = sorted(
            (
                (np.float32(score + np.float32(probability)), index, token)
                for index, (beam, score) in enumerate(zip(self.beams, self._scores, strict=True))
                for token, probability in self._candidates[beam]
            ),
            key=lambda entry: (-entry[0], entry[1:]),
        )[: num_candidates(first)]
        self._candidates.clear()
        length = first.num_output_tokens + 1
        at_limit = first.num_prompt_tokens + length >= first.max_total_tokens
        ends = [at_limit or token in first.stop_token_ids for _, _, token in continued]
        for (score, index, token), ended in itertools.islice(zip(continued, ends, strict=True), width):
            if ended:
                outputs = self.beams[index].token_ids[first.num_prompt_tokens :]
                self.finished.append((self._normalised(score, length), [*outputs, token]))
        self.finished = sorted(self.finished, key=lambda entry: -entry[0])[:width]
        open_beams = [entry for entry, ended in zip(continued, ends, strict=True) if not ended][:width]
        if not open_beams or self._has_ended(open_beams[0][0], length):
            return []
        self._scores = [score for score, _, _ in open_beams]
        return [(index, token) for _, index, token in open_beams]

    def branch(self, chosen: list[tuple[int, int]], scheduler: Scheduler) -> None:
        """Replace `beams` by what `advance` chose.

        The first continuation of a beam takes its place, the others fork from it; a beam without any gives its blocks
        back.
        """
        parents = self.beams
        first = {parent: place for place, (parent, _) in reversed(list(enumerate(chosen)))}
        unused = [beam for index, beam in enumerate(parents) if index not in first]
        for beam in unused:
            scheduler.release(beam)
        self.beams = [parents[parent] for parent, _ in chosen]
        forks: list[tuple[Request, Request]] = []
        for place, (parent, token) in enumerate(chosen):
            if first[parent] != place:
                source = parents[parent]
                beam = unused.pop() if unused else dataclasses.replace(source, slot=-1, swapped=[])
                beam.token_ids = [*source.token_ids, token]
                self.beams[place] = beam
                forks.append((source, beam))
        for source, beam in forks:
            scheduler.fork(source, beam)
        for parent, place in first.items():
            parents[parent].token_ids.append(chosen[place][1])
            scheduler.steered(parents[parent])

    @property
    def best(self) -> list[tuple[float, list[int]]]:
        """The `n` best of `finished`."""
        return self.finished[: self.params.n]

    @property
    def reasons(self) -> list[FinishReason]:
        """Why each of the best ended."""
        return ["stop" if tokens[-1] in self.beams[0].stop_token_ids else "length" for _, tokens in self.best]

    def texts(self, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
        """Of the best; a stop token's own text is part of it only if asked for. Raises what the tokenizer does."""
        if tokenizer is None:
            return [""] * len(self.best)
        params, prompt = self.params, self.beams[0].token_ids[: self.beams[0].num_prompt_tokens]
        texts = []
        for (_, tokens), reason in zip(self.best, self.reasons, strict=True):
            shown = tokens[:-1] if reason == "stop" and not params.include_stop_str_in_output else tokens
            texts.append(whole_text(tokenizer, prompt, shown, skip_special_tokens=params.skip_special_tokens))
        return texts

    def outputs(self, last: RequestOutput, texts: list[str], reasons: list[FinishReason]) -> list[RequestOutput]:
        """The best, in order; `last` has what they have in common."""
        return [
            dataclasses.replace(
                last,
                text=text,
                token_ids=tokens,
                num_output_tokens=len(tokens),
                finish_reason=reason,
                finished=index == len(texts) - 1,
                index=index,
                score=score,
                cumulative_logprob=score * len(tokens) ** self.params.length_penalty,
            )
            for index, ((score, tokens), text, reason) in enumerate(zip(self.best, texts, reasons, strict=True))
        ]

    def _has_ended(self, best: np.float32, length: int) -> bool:
        if len(self.finished) < self.params.beam_width:
            return False
        if self.params.early_stopping is True:
            return True
        if self.params.early_stopping == "never" and self.params.length_penalty > 0:
            length = self.beams[0].max_total_tokens - self.beams[0].num_prompt_tokens
        return self._normalised(best, length) <= self.finished[-1][0]

    def _normalised(self, score: np.float32, length: int) -> float:
        return float(float(score) / length**self.params.length_penalty)
