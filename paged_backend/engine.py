"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import logging
import operator
import secrets
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineDead, InvalidArgument, Overloaded
from paged_backend.kv_cache.block_pool import BlockPool
from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.metrics import Metrics
from paged_backend.plugins.manager import PluginManager
from paged_backend.request import FinishReason, Request, RequestOutput, SamplingParams
from paged_backend.runner.capacity import choose_num_blocks
from paged_backend.runner.check import peak_step_bytes, verify
from paged_backend.runner.loader import LoadedModel, context_length, eos_token_ids
from paged_backend.runner.runner import ModelRunner, PagedModel
from paged_backend.scheduler.scheduler import Scheduler, StepPlan
from paged_backend.stats import EngineStats, StepStats
from paged_backend.text.output import OutputText

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]


@dataclass(slots=True)
class _Live:
    """A request that has not ended, and its text if there is a tokenizer."""

    request: Request
    text: OutputText | None


class Engine:
    """A model over a paged KV cache, serving many requests at once by continuous batching.

    Single-threaded: call it from one thread; `SharedEngine`, `EngineThread` and `AsyncEngine` are for many callers.
    Raises `InvalidArgument` for a configuration the machine or the model cannot meet, and `UnsupportedModel`.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        plugins: Iterable[object] = (),
    ) -> None:
        """Load `config.model`, or serve the very `model` given, with its weights shared."""
        self.metrics = Metrics(self.stats)
        self.plugins = PluginManager([self.metrics, *plugins])
        policy = self.plugins.make(
            "paged_scheduling_policy", "scheduling_policy", config.scheduling_policy, config=config
        )
        backend = self.plugins.make(
            "paged_attention_backend", "attention_backend", config.attention_backend, config=config
        )
        if model is None:
            loaded = self.plugins.hook.paged_load_model(config=config)
        else:
            # The caller's own use of a tokenizer sets its padding and truncation, and would change our prompts.
            loaded = LoadedModel(model, copy.deepcopy(tokenizer))
        self.config, self.model, self.tokenizer = config, loaded.model, loaded.tokenizer
        self.vocab_size: int = self.model.get_input_embeddings().weight.shape[0]
        self._eos = eos_token_ids(self.model)
        trained = context_length(self.model)
        if config.max_model_len is not None and config.max_model_len > trained:
            raise InvalidArgument("max_model_len", config.max_model_len, f"at most {trained}, the model's context")
        sampler = self.plugins.hook.paged_sampler(config=config)
        processors = [made for made in self.plugins.hook.paged_logits_processor(config=config) if made is not None]
        self._paged_model = PagedModel(self.model, backend)
        try:
            self.tables = self._make_cache(min(config.max_model_len or trained, trained))
        except BaseException:
            self._paged_model.close()
            raise
        self._runner = ModelRunner(
            self._paged_model,
            self.tables,
            max_model_len=self.max_model_len,
            sampler=sampler,
            logits_processors=processors,
        )
        self._scheduler = Scheduler(policy, self.tables, max_num_batched_tokens=config.max_num_batched_tokens)
        self._live: dict[str, _Live] = {}
        self._pending: list[RequestOutput] = []
        """Outputs for the next step to return."""
        self._collected: dict[str, deque[RequestOutput]] = {}
        """Outputs of the requests of `generate` and `stream`, which no other caller of `step` gets."""
        self._arrivals, self._names = itertools.count(), itertools.count()
        self._steps = self._computed_tokens = self._output_tokens = self._preemptions = 0
        self.error: Exception | None = None
        """What killed the engine; None while it serves."""
        observer = self.plugins.observer
        self._on_arrived, self._on_scheduled = (
            observer("paged_request_arrived"),
            observer("paged_request_scheduled"),
        )
        self._on_preempted, self._on_first_token = (
            observer("paged_request_preempted"),
            observer("paged_request_first_token"),
        )
        self._on_ended, self._on_step = observer("paged_request_ended"), observer("paged_step_ended")

    def _make_cache(self, max_model_len: int) -> BlockTables:
        """Check the model over a small cache, then make the real one, as large as is useful and fits."""
        config, paged = self.config, self._paged_model
        verify(paged, config.block_size)
        num_blocks = choose_num_blocks(
            config,
            [layer.spec for layer in paged.layers],
            paged.dtype,
            paged.device,
            measure_step=lambda: peak_step_bytes(paged, config, max_model_len),
        )
        num_blocks = min(num_blocks, config.max_num_seqs * -(-max_model_len // config.block_size))
        room = num_blocks * config.block_size
        if config.max_model_len is not None and config.max_model_len > room:
            raise InvalidArgument(
                "max_model_len",
                config.max_model_len,
                f"the KV cache holds {room} tokens; raise kv_cache_bytes or num_blocks",
            )
        if room < 2:
            raise InvalidArgument(
                "num_blocks", num_blocks, f"of {config.block_size} tokens; a request needs room for 2"
            )
        if max_model_len > room:
            logger.warning("max_model_len is %d, limited by the KV cache; the model can do %d", room, max_model_len)
        self.max_model_len = min(max_model_len, room)
        paged.allocate(num_blocks, config.block_size)
        return BlockTables(
            BlockPool(num_blocks),
            block_size=config.block_size,
            num_slots=config.max_num_seqs,
            max_model_len=self.max_model_len,
        )

    # ---- requests

    def make_request(
        self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None
    ) -> Request:
        """Tokenise and validate; nothing is accepted yet. May be called from any thread. Raises `InvalidArgument`."""
        params = params or SamplingParams()
        token_ids = self._tokenise(prompt)
        room = self.max_model_len - len(token_ids)
        if room < 1:
            raise InvalidArgument(
                "prompt", prompt, f"has {len(token_ids)} tokens; at most {self.max_model_len - 1} are allowed"
            )
        if params.stop and self.tokenizer is None:
            raise InvalidArgument("stop", params.stop, "stop strings need a tokenizer, and this engine has none")
        stops = set(params.stop_token_ids) if params.ignore_eos else self._eos.union(params.stop_token_ids)
        request = Request(
            request_id=request_id or f"request-{next(self._names)}",
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            params=params,
            max_total_tokens=len(token_ids) + min(params.max_tokens, room),
            stop_token_ids=frozenset(token for token in stops if 0 <= token < self.vocab_size),  # others never come
            seed=secrets.randbits(63) if params.seed is None else params.seed,
        )
        self.plugins.hook.paged_request_filter(request=request)
        return request

    def _tokenise(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidArgument("prompt", prompt, "this engine has no tokenizer; send token ids")
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise InvalidArgument(
                    "prompt", prompt, f"must be valid Unicode: {error.reason} at {error.start}"
                ) from None
            token_ids: list[int] = self.tokenizer(prompt).input_ids
        else:
            try:
                token_ids = [operator.index(token) for token in prompt]
            except TypeError as error:
                raise InvalidArgument("prompt", prompt, f"must be text or a sequence of token ids: {error}") from None
        if not token_ids:
            raise InvalidArgument("prompt", prompt, "must have at least one token")
        # Of text too: tokenizers may have added tokens that the model has no embedding for.
        at = next((at for at, token in enumerate(token_ids) if not 0 <= token < self.vocab_size), None)
        if at is not None:
            raise InvalidArgument(f"prompt[{at}]", token_ids[at], f"must be a token id in 0..{self.vocab_size - 1}")
        return token_ids

    def enqueue(self, request: Request) -> None:
        """Accept a request made by `make_request`, however many wait: from here on it ends exactly once.

        Raises `EngineDead`, or `InvalidArgument` for an id in use.
        """
        if self.error is not None:
            raise EngineDead(f"the engine has stopped: {self.error}") from self.error
        if request.request_id in self._live:
            raise InvalidArgument("request_id", request.request_id, "is in use by a request that has not ended")
        request.arrival_index = next(self._arrivals)
        text = None if self.tokenizer is None else OutputText(self.tokenizer, request)
        self._live[request.request_id] = _Live(request, text)
        self._scheduler.add(request)
        self._on_arrived(request=request)

    def add_request(
        self, prompt: Prompt, params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> str:
        """Accept a request and return its id.

        Raises as `make_request` and `enqueue` do, and `Overloaded` when `max_waiting` requests wait.
        """
        request = self.make_request(prompt, params, request_id)
        if len(self._scheduler.waiting) >= self.config.max_waiting:
            raise Overloaded(
                f"{len(self._scheduler.waiting)} requests wait already; max_waiting is {self.config.max_waiting}"
            )
        self.enqueue(request)
        return request.request_id

    def abort(self, request_id: str) -> bool:
        """End a request; its last output comes with the next step. False if it is unknown or has ended."""
        live = self._live.get(request_id)
        if live is None:
            return False
        text = live.text.add([], last=True)[0] if live.text is not None else ""  # what was held back
        self._pending.append(self._end(live, "abort", text=text))
        return True

    def _end(
        self,
        live: _Live,
        reason: FinishReason,
        error: Exception | None = None,
        token_ids: list[int] | None = None,
        text: str = "",
    ) -> RequestOutput:
        """End a request, free what it holds and make its last output."""
        request = live.request
        self._scheduler.remove(request)
        del self._live[request.request_id]
        request.end(reason, error)
        self._on_ended(request=request)
        return output_of(request, token_ids or [], text)

    # ---- steps

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._pending or (self._live and self.error is None))

    def step(self) -> list[RequestOutput]:
        """Run one step and return what it brought, at most one output a request.

        Never raises: an error on the device, or in the engine itself, ends every request with it, and the engine.
        """
        self._advance()
        outputs, self._pending = self._pending, []
        return outputs

    def _advance(self) -> None:
        """One step; its outputs go to whom they belong."""
        outputs, self._pending = self._pending, []
        try:
            if self._scheduler.has_work and self.error is None:
                self._step(outputs)
        except Exception as error:
            logger.exception("the engine met an error it cannot survive")
            self.error = error
            outputs += self._end_all(error)
        except BaseException:  # Ctrl-C on the thread that steps: undo the step, for the sake of other callers
            self._scheduler.preempt_all()
            raise
        finally:
            for output in outputs:
                collected = self._collected.get(output.request_id)
                (self._pending if collected is None else collected).append(output)

    def _step(self, outputs: list[RequestOutput]) -> None:
        began = time.perf_counter()
        plan = self._scheduler.schedule()
        self._observe_plan(plan)
        tokens = self._runner.execute(plan)
        sampled = [request for request, samples in zip(plan.requests, plan.samples, strict=True) if samples]
        for request, token in zip(sampled, tokens, strict=True):
            outputs.append(self._commit(request, token))  # one by one: those before an error are kept
        self._steps += 1
        self._computed_tokens += plan.num_tokens
        self._output_tokens += len(tokens)
        self._on_step(stats=StepStats(len(plan.requests), plan.num_tokens, len(tokens), time.perf_counter() - began))

    def _end_all(self, error: Exception) -> list[RequestOutput]:
        """End every request with `error`, even if the scheduler is what failed."""
        outputs = []
        for live in list(self._live.values()):
            try:
                outputs.append(self._end(live, "error", error))
            except Exception:
                logger.exception("request %s could not be ended in order", live.request.request_id)
                self._live.pop(live.request.request_id, None)
                if not live.request.ended:
                    live.request.end("error", error)
                outputs.append(output_of(live.request, [], ""))
        return outputs

    def _observe_plan(self, plan: StepPlan) -> None:
        now = time.monotonic()
        for request in plan.preempted:
            self._preemptions += 1
            self._on_preempted(request=request)
        for request in plan.admitted:
            request.scheduled_time = request.scheduled_time or now
            self._on_scheduled(request=request)

    def _commit(self, request: Request, token: int) -> RequestOutput:
        """Give a request its next token, and end it if that was the last."""
        live = self._live[request.request_id]
        if token < 0:
            return self._end(live, "error", FloatingPointError("the model's logits for this request are not finite"))
        request.token_ids.append(token)
        if request.first_token_time is None:
            request.first_token_time = time.monotonic()
            self._on_first_token(request=request)
        reason: FinishReason | None = None
        if token in request.stop_token_ids:
            reason = "stop"
        elif len(request.token_ids) >= request.max_total_tokens:
            reason = "length"
        text = ""
        if live.text is not None:
            try:
                # A stop token's own text is not part of the output.
                text, stopped = live.text.add([] if reason == "stop" else [token], last=reason is not None)
            except Exception as error:
                logger.exception("request %s: its text cannot be decoded", request.request_id)
                return self._end(live, "error", error, [token])
            reason = "stop" if stopped else reason
        return self._end(live, reason, token_ids=[token], text=text) if reason else output_of(request, [token], text)

    # ---- whole requests

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Whole outputs of all prompts, in order. One request's failure is in its output, not raised.

        Raises `InvalidArgument` before anything runs if a prompt or its parameters are bad. Prompts beyond
        `max_waiting` are fed as others finish.
        """
        requests = [
            self.make_request(prompt, one) for prompt, one in zip(prompts, spread(params, prompts), strict=True)
        ]
        todo = deque(requests)
        with self._collecting(requests):
            while todo or any(request.request_id in self._live for request in requests):
                while todo and len(self._scheduler.waiting) < self.config.max_waiting:
                    self.enqueue(todo.popleft())
                self._advance()
            return [join(self._collected[request.request_id]) for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Outputs of one prompt as they come. Leaving the iterator early aborts the request."""
        request = self.make_request(prompt, params)
        with self._collecting([request]):
            self.enqueue(request)
            outputs = self._collected[request.request_id]
            while outputs or request.request_id in self._live:
                while not outputs:
                    self._advance()
                yield outputs.popleft()

    @contextlib.contextmanager
    def _collecting(self, requests: Sequence[Request]) -> Iterator[None]:
        """Keep the outputs of these requests for the caller, and abort what is left of them in the end."""
        self._collected |= {request.request_id: deque() for request in requests}
        try:
            yield
        finally:
            for request in requests:
                if (live := self._live.get(request.request_id)) is not None and live.request is request:
                    self._end(live, "abort")
                del self._collected[request.request_id]

    def stats(self) -> EngineStats:
        """Numbers of now; safe to call from another thread."""
        pool = self.tables.pool
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            blocks_used=pool.num_used,
            blocks_total=pool.num_blocks,
            steps=self._steps,
            computed_tokens=self._computed_tokens,
            output_tokens=self._output_tokens,
            preemptions=self._preemptions,
        )

    def close(self) -> None:
        """Abort what runs, drop the cache, and give the model its own attention back. The engine is dead after."""
        if self.error is None:
            for request_id in list(self._live):
                self.abort(request_id)
            self.error = EngineDead("the engine was closed")
        self._paged_model.close()


def spread(
    params: SamplingParams | Sequence[SamplingParams] | None, prompts: Sequence[Prompt]
) -> Sequence[SamplingParams]:
    """Parameters for each prompt. Raises `InvalidArgument` for a list of another length, and for a bare string."""
    if isinstance(prompts, str):
        raise InvalidArgument("prompts", prompts, "must be a list of prompts")
    count = len(prompts)
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidArgument("params", f"{len(params)} SamplingParams", f"one, or as many as the {count} prompts")
    return params


def join(parts: Sequence[RequestOutput]) -> RequestOutput:
    """One output of all a request's outputs."""
    return dataclasses.replace(
        parts[-1],
        text="".join(part.text for part in parts),
        token_ids=[token for part in parts for token in part.token_ids],
    )


def output_of(request: Request, token_ids: list[int], text: str) -> RequestOutput:
    """The output that brings these new tokens and text of a request."""
    return RequestOutput(
        request_id=request.request_id,
        text=text,
        token_ids=token_ids,
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=request.num_output_tokens,
        finish_reason=request.finish_reason,
        error=request.error,
        arrival_time=request.arrival_time,
        first_token_time=request.first_token_time,
        end_time=request.end_time,
    )
