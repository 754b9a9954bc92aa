"""Runs the rows of one generate() call in the engine, each on its own, beside the rows of every other call."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence

from paged_backend.errors import EngineDead, Overloaded
from paged_backend.request import OutputCallback, RequestOptions, RequestOutput, SamplingParams
from paged_backend.shared_engine import SharedEngine


class Rows:
    """One call: its requests, and the tokens they have so far.

    Rows that end before the longest are filled with `pad`. `on_column`, when given, gets the tokens of each step in
    order, one a row.
    """

    def __init__(
        self, engine: SharedEngine, count: int, pad: int, on_column: Callable[[list[int]], None] | None
    ) -> None:
        self._tokens: list[list[int]] = [[] for _ in range(count)]
        self._engine, self._pad, self._on_column = engine, pad, on_column
        # Without prefix caching the rows of one call still share their beginnings, and nobody else's.
        shared = engine.engine.config.enable_prefix_caching
        self._options = RequestOptions(cache_salt=None if shared else uuid.uuid4().hex)
        self._request_ids: list[str] = []
        self._running: set[int] = set()
        """Rows submitted and not ended."""
        self._columns = 0
        self._error: Exception | None = None

    def run(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
        """Submit every row, wait until all have ended, and return their tokens, equally many for each row.

        Raises what made a row fail, or what `on_column` raised, after aborting the other rows.
        """
        try:
            for row, prompt in enumerate(prompts):
                self._submit(row, prompt, params[row])
            while self._running or self._error is not None:
                self._wait()
        except BaseException:
            for request_id in self._request_ids:
                self._engine.abort(request_id)
            self._engine.run_until(lambda: not self._running)
            raise
        steps = max(map(len, self._tokens))
        return [tokens + [self._pad] * (steps - len(tokens)) for tokens in self._tokens]

    def _submit(self, row: int, prompt: list[int], params: SamplingParams) -> None:
        while True:
            self._running.add(row)  # before its first output can come, on another thread
            try:
                self._request_ids.append(
                    self._engine.submit(prompt, params, self._options, on_output=self._listener(row))
                )
                return
            except BaseException as error:
                self._running.discard(row)
                # More rows than the engine lets wait: go on as soon as one of this call has ended.
                if not (isinstance(error, Overloaded) and self._running):
                    raise
            self._wait()

    def _listener(self, row: int) -> OutputCallback:
        def on_output(output: RequestOutput) -> None:
            self._tokens[row] += output.token_ids
            if output.finished:
                self._running.discard(row)
            if output.finish_reason in ("abort", "error"):
                self._error = output.error or EngineDead("the model was unpatched while generate ran")

        return on_output

    def _wait(self) -> None:
        """Return when a row has ended, or when there is a column to hand out."""
        unfinished = len(self._running)

        def changed() -> bool:
            return not self._running or len(self._running) < unfinished or self._whole() > self._columns

        self._engine.run_until(changed)
        if self._error is not None:
            raise self._error
        for column in range(self._columns, self._whole()):
            if self._on_column is not None:
                self._on_column([row[column] if column < len(row) else self._pad for row in self._tokens])
            self._columns = column + 1

    def _whole(self) -> int:
        """Columns that every row has reached or ended before; 0 if nobody asks for columns."""
        if self._on_column is None:
            return 0
        return min((len(self._tokens[row]) for row in self._running), default=max(map(len, self._tokens)))
