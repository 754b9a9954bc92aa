"""Beam search of one request: which beams go on, which are finished, and when to stop.

Scores, order and stopping are those of transformers' `generate(num_beams=...)`; float32 throughout, as there.
"""

from __future__ import annotations

import itertools

import numpy as np

from paged_backend.request import Request

Candidates = list[tuple[int, float]]
"""Token ids and their log-probabilities, the likeliest first."""


class BeamSearch:
    """The state of one search. Pure: whoever owns it forks and frees the beams' blocks as `advance` says."""

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
        """The next beams, as (index in `beams` of the one continued, token); [] when the search has ended.

        The owner replaces `beams` accordingly, in the same order.
        """
        width, first = self.params.beam_width, self.beams[0]
        continued = sorted(
            (
                (np.float32(score + np.float32(probability)), index, token)
                for index, (beam, score) in enumerate(zip(self.beams, self._scores, strict=True))
                for token, probability in self._candidates[beam]
            ),
            key=lambda entry: (-entry[0], entry[1:]),
        )[: max(2, 1 + len(first.stop_token_ids)) * width]
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

    def _has_ended(self, best: np.float32, length: int) -> bool:
        if len(self.finished) < self.params.beam_width:
            return False
        if self.params.early_stopping is True:
            return True
        if self.params.early_stopping == "never" and self.params.length_penalty > 0:
            length = self.beams[0].max_total_tokens - self.beams[0].num_prompt_tokens
        return self._normalised(best, length) <= self.finished[-1][0]

    def _normalised(self, score: np.float32, length: int) -> float:
        return float(score / np.float32(length**self.params.length_penalty))
