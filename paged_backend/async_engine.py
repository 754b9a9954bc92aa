"""The engine for asyncio programs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING

from paged_backend.config import EngineConfig
from paged_backend.engine import Engine
from paged_backend.engine_thread import EngineThread
from paged_backend.intake import Prompt
from paged_backend.outputs import Whole
from paged_backend.request import RequestOptions, RequestOutput, SamplingParams
from paged_backend.stats import EngineStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class AsyncEngine:
    """An `EngineThread` whose outputs arrive on the caller's event loop."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        plugins: Iterable[object] = (),
    ) -> None:
        """As `Engine`."""
        self._thread = EngineThread(lambda: Engine(config, model=model, tokenizer=tokenizer, plugins=plugins))

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, options: RequestOptions | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of one prompt as they come. Leaving the iterator, or cancelling the task, aborts the request.

        Raises `InvalidArgument`, `Overloaded` or `EngineDead` before the first output.
        """
        loop = asyncio.get_running_loop()
        outputs: asyncio.Queue[RequestOutput] = asyncio.Queue()

        def on_output(output: RequestOutput) -> None:
            loop.call_soon_threadsafe(outputs.put_nowait, output)

        request_id = self._thread.submit(prompt, params, options, on_output=on_output)
        try:
            while not (output := await outputs.get()).finished:
                yield output
            yield output
        finally:
            self._thread.abort(request_id)

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, options: RequestOptions | None = None
    ) -> RequestOutput:
        """The whole output of one prompt; gather several to run them together."""
        whole = Whole()
        async for output in self.stream(prompt, params, options):
            whole.append(output)
        return whole.joined()

    def stats(self) -> EngineStats:
        """Numbers of the engine now."""
        return self._thread.stats()

    async def close(self) -> None:
        """Abort what runs and stop the engine."""
        await asyncio.to_thread(self._thread.close)
