"""Runs the rows of one generate() call in the engine, each on its own, beside the rows of every other call."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence

from paged_backend.engine_thread import EngineThread
from paged_backend.errors import EngineDead, Overloaded
from paged_backend.request import OutputCallback, RequestOutput, SamplingParams


class Rows:
    """One call: its requests, and the tokens they have so far.

    Rows that end before the longest are filled with `pad`. `on_column`, when given, gets the tokens of each step in
    order, one a row.
    """

    def __init__(
        self, thread: EngineThread, count: int, pad: int, on_column: Callable[[list[int]], None] | None
    ) -> None:
        self._tokens: list[list[int]] = [[] for _ in range(count)]
        self._thread, self._pad, self._on_column = thread, pad, on_column
        self._request_ids: dict[int, str] = {}
        self._running = set(range(count))
        self._columns = 0
        self._outputs: queue.SimpleQueue[tuple[int, RequestOutput]] = queue.SimpleQueue()

    def run(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
        """Submit every row, wait until all have ended, and return their tokens, equally many for each row.

        Raises what made a row fail, or what `on_column` raised, after aborting the other rows.
        """
        try:
            for row, prompt in enumerate(prompts):
                self._submit(row, prompt, params[row])
            while self._running:
                self._wait()
        except BaseException:
            for request_id in self._request_ids.values():
                self._thread.abort(request_id)
            raise
        steps = max(map(len, self._tokens))
        return [tokens + [self._pad] * (steps - len(tokens)) for tokens in self._tokens]

    def _submit(self, row: int, prompt: list[int], params: SamplingParams) -> None:
        while True:
            try:
                self._request_ids[row] = self._thread.submit(prompt, params, on_output=self._listener(row))
                return
            except Overloaded:
                # More rows than the engine lets wait: go on as soon as one of this call has ended.
                if not self._request_ids:
                    raise
                self._wait()

    def _listener(self, row: int) -> OutputCallback:
        def on_output(output: RequestOutput) -> None:
            self._tokens[row] += output.token_ids
            # Waking the caller for every token is worth its cost only to a streamer.
            if output.finished or self._on_column is not None:
                self._outputs.put((row, output))

        return on_output

    def _wait(self) -> None:
        row, output = self._outputs.get()
        if output.finished:
            del self._request_ids[row]
            self._running.discard(row)
            if output.finish_reason in ("abort", "error"):
                raise output.error or EngineDead("the model was unpatched while generate ran")
        if self._on_column is None:
            return
        whole = min((len(self._tokens[row]) for row in self._running), default=max(map(len, self._tokens)))
        for column in range(self._columns, whole):
            self._on_column([row[column] if column < len(row) else self._pad for row in self._tokens])
        self._columns = whole
