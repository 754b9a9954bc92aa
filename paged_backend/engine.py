"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import contextlib
import copy
import heapq
import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paged_backend.beam import BeamSearch
from paged_backend.config import EngineConfig
from paged_backend.errors import DeadlineExceeded, EngineDead, InvalidArgument, Overloaded
from paged_backend.intake import Intake, Prompt, Spread, sibling, spread
from paged_backend.interrupts import HeldBack
from paged_backend.laps import Laps
from paged_backend.metrics import Metrics
from paged_backend.outputs import Whole, as_logprobs, output_of
from paged_backend.plugins.manager import PluginManager
from paged_backend.request import FinishReason, Request, RequestOptions, RequestOutput, SamplingParams
from paged_backend.runner.cache import make_cache
from paged_backend.runner.edits import any_allowed
from paged_backend.runner.loader import LoadedModel, context_length, eos_token_ids
from paged_backend.runner.logprobs import Sampled
from paged_backend.runner.runner import Got, Launched
from paged_backend.runner.setup import default_backend, make_model, make_runner, on_device, with_defaults_of
from paged_backend.scheduler.plan import StepPlan
from paged_backend.scheduler.scheduler import Scheduler
from paged_backend.stats import EngineStats, StepStats
from paged_backend.text.output import OutputText

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_NOT_FINITE = "the model's logits for this request are not finite"
_MASKS = ("structured_outputs", "allowed_token_ids", "bad_words", "min_tokens")


@dataclass(slots=True)
class _Live:
    """A request that has not ended."""

    sequences: dict[Request, OutputText | None]
    """Its outputs that have not ended, and their texts if there is a tokenizer. Of a beam search, the first beam."""
    search: BeamSearch | None = None


@dataclass(slots=True)
class _InFlight:
    """A step that was launched, and whose tokens are not committed."""

    plan: StepPlan
    launched: Launched
    seconds: float
    """Spent on it so far."""


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
        laps = Laps()
        self.metrics = Metrics(self.stats)
        self.plugins = PluginManager([self.metrics, *plugins])
        make = self.plugins.make
        policy = make("paged_scheduling_policy", "scheduling_policy", config.scheduling_policy, config=config)
        preemption = make("paged_preemption_policy", "preemption_policy", config.preemption_policy, config=config)
        grammar_backend = make("paged_grammar_backend", "grammar_backend", config.grammar_backend, config=config)
        backend = None
        if (chosen := config.attention_backend) != "auto":
            backend = make("paged_attention_backend", "attention_backend", chosen, config=config)
        if model is None:
            loaded = self.plugins.hook.paged_load_model(config=config)
        else:
            # The caller's own use of a tokenizer sets its padding and truncation, and would change our prompts.
            loaded = LoadedModel(model, copy.deepcopy(tokenizer))
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        laps.end("weights")
        if backend is None:
            chosen = default_backend(self.model.device)
            backend = make("paged_attention_backend", "attention_backend", chosen, config=config)
        self.config = config = with_defaults_of(backend, config)
        self.vocab_size: int = self.model.get_input_embeddings().weight.shape[0]
        trained = context_length(self.model)
        if config.max_model_len is not None and config.max_model_len > trained:
            raise InvalidArgument("max_model_len", config.max_model_len, f"at most {trained}, the model's context")
        longest = config.max_model_len or trained
        sampler = self.plugins.hook.paged_sampler(config=config)
        processors = [made for made in self.plugins.hook.paged_logits_processor(config=config) if made is not None]
        with on_device(self.model.device):
            self._paged_model = paged = make_model(config, self.model, backend, longest)
            laps.end("model")
            try:
                cache = make_cache(
                    config,
                    paged,
                    longest,
                    lambda: make("paged_eviction_policy", "eviction_policy", config.eviction_policy, config=config),
                )
                laps.end("cache")
                self._runner = make_runner(config, paged, cache, sampler, processors)
                laps.end("runner")
            except BaseException:
                paged.close()
                raise
        self.tables, self.max_model_len = cache.tables, cache.max_model_len
        self._host, self._costs = cache.host, cache.costs
        self._scheduler = Scheduler(
            policy,
            self.tables,
            max_num_batched_tokens=config.step_tokens,
            max_prefill_tokens=config.prefill_tokens,
            preemption=preemption,
            costs=self._costs,
            host=self._host,
            prefers_whole=self._runner.prefers_whole,
        )
        self.intake = Intake(
            config,
            self.tokenizer,
            self.plugins,
            grammar_backend,
            vocab_size=self.vocab_size,
            eos=eos_token_ids(self.model),
            max_model_len=self.max_model_len,
        )
        self._look_ahead = config.look_ahead and not processors  # these are shown all tokens of their requests
        self._in_flight: deque[_InFlight] = deque()
        """At most two, and between steps at most one."""
        self._live: dict[str, _Live] = {}
        self._num_alone = 0
        """Requests that nothing may run ahead of."""
        self._deadlines: list[tuple[float, int, Request]] = []
        """A heap of when requests may have to be ended."""
        self._pending: list[RequestOutput] = []
        """Outputs for the next step to return."""
        self._collected: dict[str, deque[RequestOutput] | Whole] = {}
        """Outputs of the requests of `generate` and `stream`, which no other caller of `step` gets."""
        self._arrivals = itertools.count()
        self._steps = self._computed_tokens = self._output_tokens = 0
        self._now = 0.0
        """When the tokens came that are committed."""
        self._gaps: list[float] = []
        """How long after the one before each of them came, that is not the first of its request."""
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
        self.start_seconds = laps.seconds
        """What making the engine took: loading `weights`, checking the `model` and fusing it, with the kernels compiled
        for that, making room for the `cache`, and what the `runner` prepares, CUDA graphs and their kernels."""
        logger.info("ready after %s", laps)

    # ---- requests

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        request_id: str | None = None,
        arrival_time: float | None = None,
    ) -> Request:
        """Tokenise and validate; nothing is accepted yet. May be called from any thread.

        `arrival_time`, in `time.monotonic()` seconds, is when it came; None: now. Raises `InvalidArgument`, and
        `DeadlineExceeded` if its time is over already.
        """
        request = self.intake.make(prompt, params, options, request_id, arrival_time)
        if request.steered:
            self._check_beams(request)
        return request

    def _check_beams(self, request: Request) -> None:
        """Beams go on together, so all of a search must fit into the cache at once; they share only the prompt."""
        width, tables = request.params.beam_width, self.tables
        apart = tables.blocks_for(request.max_total_tokens - request.num_prompt_tokens) + 2
        needed = len(tables.groups) * (tables.blocks_for(request.num_prompt_tokens) + width * apart)
        if needed > tables.pool.num_blocks:
            raise InvalidArgument(
                "beam_width",
                width,
                f"takes up to {needed} KV blocks with {request.num_prompt_tokens} prompt tokens and "
                f"max_tokens={request.params.max_tokens}; the cache has {tables.pool.num_blocks}",
            )

    def check_room(self, arrived: int = 0) -> None:
        """Raises `Overloaded` when `max_waiting` requests wait, with those that arrived and are not enqueued yet."""
        waiting, most = len(self._scheduler.waiting) + arrived, self.config.max_waiting
        if waiting >= most:
            raise Overloaded(f"{waiting} requests wait already; max_waiting is {most}")

    def enqueue(self, request: Request) -> None:
        """Accept a request made by `make_request`, however many wait: from here on it ends exactly once.

        Raises `EngineDead`, or `InvalidArgument` for an id in use.
        """
        if self.error is not None:
            raise EngineDead(f"the engine has stopped: {self.error}") from self.error
        if request.request_id in self._live:
            raise InvalidArgument("request_id", request.request_id, "is in use by a request that has not ended")
        sequences = [request]
        if not request.steered:
            sequences += [sibling(request, index) for index in range(1, request.params.n)]
        self._live[request.request_id] = live = _Live({}, BeamSearch(request) if request.steered else None)
        self._num_alone += request.runs_alone
        for sequence in sequences:
            sequence.arrival_index = next(self._arrivals)
            has_text = self.tokenizer is not None and not request.steered
            live.sequences[sequence] = OutputText(self.tokenizer, sequence) if has_text else None
            self._scheduler.add(sequence)
            self._on_arrived(request=sequence)
            deadline = min(sequence.deadline, sequence.queue_deadline)
            if deadline < float("inf"):
                heapq.heappush(self._deadlines, (deadline, sequence.arrival_index, sequence))

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        request_id: str | None = None,
    ) -> str:
        """Accept a request and return its id.

        Raises as `make_request`, `check_room` and `enqueue` do.
        """
        request = self.make_request(prompt, params, options, request_id)
        self.check_room()
        self.enqueue(request)
        return request.request_id

    def abort(self, request_id: str) -> bool:
        """End a request; its last output comes with the next step. False if it is unknown or has ended."""
        live = self._live.get(request_id)
        if live is None:
            return False
        for sequence, text in list(live.sequences.items()):
            held_back = "" if text is None else text.add([], last=True)[0]
            self._pending.append(self._end(sequence, "abort", text=held_back))
        return True

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        error: Exception | None = None,
        token_ids: list[int] | None = None,
        text: str = "",
    ) -> RequestOutput:
        """End one output of a request, free what it holds and make its last `RequestOutput`."""
        live = self._live[request.request_id]
        if live.search is not None:
            for beam in live.search.beams:
                self._scheduler.release(beam)
        self._scheduler.remove(request)
        del live.sequences[request]
        if not live.sequences:
            del self._live[request.request_id]
            self._num_alone -= request.runs_alone
        request.end(reason, error)
        self._on_ended(request=request)
        return output_of(request, token_ids or [], text, finished=not live.sequences)

    def _expire(self, outputs: list[RequestOutput]) -> None:
        """End the requests whose time is over."""
        now = time.monotonic()
        if len(self._deadlines) > 2 * (self._scheduler.num_running + len(self._scheduler.waiting)) + 64:
            self._deadlines = [entry for entry in self._deadlines if not entry[2].ended]
            heapq.heapify(self._deadlines)
        while self._deadlines and self._deadlines[0][0] <= now:
            _, index, request = heapq.heappop(self._deadlines)
            if request.ended:
                continue
            since = now - request.arrival_time
            if request.deadline <= now:
                field = "timeout"
            elif request.scheduled_time is None:
                field = "queue_timeout"
            else:
                if request.deadline < float("inf"):
                    heapq.heappush(self._deadlines, (request.deadline, index, request))
                continue
            limit = (request.deadline if field == "timeout" else request.queue_deadline) - request.arrival_time
            error = DeadlineExceeded.of(field, limit, since)
            text = self._live[request.request_id].sequences[request]
            held_back = "" if text is None else text.add([], last=True)[0]
            outputs.append(self._end(request, "error", error, text=held_back))

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes, as when the weights have changed. What runs goes on with what it has."""
        self._scheduler.prefix_cache.reset()

    # ---- steps

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._pending or (self._live and self.error is None))

    def step(self) -> list[RequestOutput]:
        """Wait for one step and return what it brought; the next one runs already, if `look_ahead` is on.

        Never raises: an error on the device, or in the engine itself, ends every request with it, and the engine.
        """
        self._advance()
        outputs, self._pending = self._pending, []
        return outputs

    def _advance(self) -> None:
        """One step; its outputs go to whom they belong."""
        with HeldBack() as held_back:
            outputs, self._pending = self._pending, []
            try:
                if (self._live or self._in_flight) and self.error is None:
                    self._step(outputs, held_back)
            except Exception as error:
                logger.exception("the engine met an error it cannot survive")
                self.error = error
                outputs += self._end_all(error)
                with held_back.let_in():
                    self._abandon()
            except BaseException:  # Ctrl-C on the thread that steps: undo the steps, for the sake of other callers
                self._scheduler.cancel()
                with held_back.let_in():
                    self._abandon()
                raise
            finally:
                for output in outputs:
                    collected = self._collected.get(output.request_id)
                    (self._pending if collected is None else collected).append(output)

    def _step(self, outputs: list[RequestOutput], held_back: HeldBack) -> None:
        """Launch until two steps are in flight, then commit the older one.

        That a request has stopped is known a step late; what the younger step brings for it is dropped. A request that
        a plan preempts has tokens in flight at most in the step committed next, before a plan may admit it again.
        Nothing runs ahead of requests whose next tokens depend on the last one in ways that the host works out.
        """
        self._expire(outputs)
        if not self._scheduler.num_running and not self._in_flight:
            self._paged_model.refresh()  # somebody may have trained the model meanwhile
        ahead = self._look_ahead and self._runner.asynchronous and not self._num_alone
        while self._scheduler.has_work and len(self._in_flight) <= ahead:
            self._launch(held_back)
        while self._in_flight:
            self._finish(outputs, held_back)
            if self._live and any(len(step.plan.slots) for step in self._in_flight):
                break  # else there is nothing to wait for, or nobody left: then every block is to be free

    def _launch(self, held_back: HeldBack) -> None:
        began = time.perf_counter()
        plan = self._scheduler.schedule()
        self._observe_plan(plan)
        with held_back.let_in(), on_device(self.model.device):
            launched = self._runner.launch(plan)
        self._in_flight.append(_InFlight(plan, launched, time.perf_counter() - began))

    def _finish(self, outputs: list[RequestOutput], held_back: HeldBack) -> None:
        """Wait for the oldest step in flight and commit it."""
        step, began = self._in_flight[0], time.perf_counter()
        with held_back.let_in():
            sampled = step.launched.wait()
        self._now, self._gaps = time.monotonic(), []
        for request, position, scored in step.launched.scores():
            if request.prompt_logprobs is not None:
                request.prompt_logprobs[position] = as_logprobs(scored, self.tokenizer)
        self._in_flight.popleft()
        self._scheduler.end_step()
        if not len(step.plan.slots):
            return
        before = len(outputs)
        self._commit_all(step.plan, sampled, outputs)
        seconds = step.seconds + time.perf_counter() - began
        self._learn(step.plan, seconds)
        made = sum(len(output.token_ids) for output in outputs[before:])
        self._steps += 1
        self._computed_tokens += step.plan.num_tokens
        self._output_tokens += made
        self._on_step(stats=StepStats(len(step.plan.slots), step.plan.num_tokens, made, seconds, self._gaps))

    def _abandon(self) -> None:
        """Wait for the steps in flight, if the device still runs them. What they bring is for nobody."""
        steps, self._in_flight = self._in_flight, deque()
        while self.tables.steps_in_flight:
            self._scheduler.end_step()
        for step in steps:
            with contextlib.suppress(Exception):
                step.launched.wait()

    def _commit_all(self, plan: StepPlan, sampled: list[Got], outputs: list[RequestOutput]) -> None:
        """Give every request that sampled what it got; one by one: outputs before an error are kept."""
        complete: dict[str, Request] = {}
        for request, got in zip(plan.sampling, sampled, strict=True):
            live = self._live.get(request.request_id)
            if request.ended or live is None:  # since the step was planned; or another beam of the same has ended it
                if got == -1:
                    self._scheduler.taint([])
                continue
            if isinstance(got, int | Sampled):
                outputs.append(self._commit(request, got))
            elif live.search is not None and live.search.offer(request, got):
                (complete[request.request_id],) = live.sequences
        for request in complete.values():
            if request.ended:
                continue
            try:
                outputs += self._advance_beams(self._live[request.request_id])
            except Exception as error:
                logger.exception("request %s: its beam search failed", request.request_id)
                if request.ended:
                    raise  # not the search: nobody knows what is left of it
                outputs.append(self._end(request, "error", error))

    def _learn(self, plan: StepPlan, seconds: float) -> None:
        """What computing a prompt token costs, for the choice between that and swapping."""
        if plan.num_tokens - len(plan.slots) >= 64:  # a step that is mostly prefill
            costs, now = self._costs, seconds / plan.num_tokens
            costs.seconds_per_token = 0.8 * costs.seconds_per_token + 0.2 * now if costs.seconds_per_token else now

    def _end_all(self, error: Exception) -> list[RequestOutput]:
        """End every request with `error`, even if the scheduler is what failed."""
        outputs = []
        for request in [sequence for live in self._live.values() for sequence in live.sequences]:
            try:
                outputs.append(self._end(request, "error", error))
            except Exception:
                logger.exception("request %s could not be ended in order", request.request_id)
                live = self._live.get(request.request_id)
                if live is not None:
                    live.sequences.pop(request, None)
                if live is None or not live.sequences:
                    self._live.pop(request.request_id, None)
                if not request.ended:
                    request.end("error", error)
                outputs.append(output_of(request, [], "", finished=request.request_id not in self._live))
        return outputs

    def _observe_plan(self, plan: StepPlan) -> None:
        now = time.monotonic()
        for request in plan.preempted:
            self._on_preempted(request=request)
        for request in plan.admitted:
            request.scheduled_time = request.scheduled_time or now
            self._on_scheduled(request=request)

    def _commit(self, request: Request, got: int | Sampled) -> RequestOutput:
        """Give a request its next token, and end it if that was the last."""
        live, logprobs = self._live[request.request_id], None
        token = got if isinstance(got, int) else got.token
        if token < 0:
            self._scheduler.taint([request] if live.search is None else live.search.beams)
            request = request if live.search is None else next(iter(live.sequences))
            return self._end_without_token(request)
        request.token_ids.append(token)
        is_first = request.first_token_time is None
        if isinstance(got, Sampled):
            request.cumulative_logprob = (request.cumulative_logprob or 0.0) + got.logprob
            logprobs = [as_logprobs(got, self.tokenizer)]
        if is_first:
            request.first_token_time = self._now
            self._on_first_token(request=request)
        else:
            self._gaps.append(self._now - request.last_token_time)
        request.last_token_time = self._now
        reason: FinishReason | None = None
        text, detokenised, grammar = "", live.sequences[request], request.grammar
        is_stop_token = token in request.stop_token_ids
        try:
            if grammar is not None:
                grammar.accept(token)
            if is_stop_token or (grammar is not None and grammar.is_over):
                reason = "stop"
            elif len(request.token_ids) >= request.max_total_tokens:
                reason = "length"
            if detokenised is not None:
                # A stop token's own text is part of the output only if asked for.
                hidden = is_stop_token and not request.params.include_stop_str_in_output
                text, stopped = detokenised.add([] if hidden else [token], last=reason is not None)
                reason = "stop" if stopped else reason
        except Exception as error:
            logger.exception("request %s: its token cannot be taken in", request.request_id)
            return self._end(request, "error", error, [token])
        if reason:
            output = self._end(request, reason, token_ids=[token], text=text)
        else:
            output = output_of(request, [token], text, finished=False)
        output.logprobs = logprobs
        if is_first:
            output.prompt_logprobs = request.prompt_logprobs
        return output

    def _end_without_token(self, request: Request) -> RequestOutput:
        """End a request for which no token could be chosen."""
        grammar, text = request.grammar, self._live[request.request_id].sequences[request]
        if grammar is not None and grammar.is_over:  # and `min_tokens` or the like has forbidden the stop tokens
            return self._end(request, "stop", text="" if text is None else text.add([], last=True)[0])
        error = None if grammar is None else grammar.error
        if isinstance(error, ValueError):  # of a grammar that is too much for its backend
            error = InvalidArgument("structured_outputs", request.params.structured_outputs, str(error))
        if error is None and not any_allowed(request, self.vocab_size):
            masks = {name: value for name in _MASKS if (value := getattr(request.params, name))}
            error = InvalidArgument(*next(iter(masks.items())), f"no token is allowed next, with {', '.join(masks)}")
        return self._end(request, "error", error or FloatingPointError(_NOT_FINITE))

    def _advance_beams(self, live: _Live) -> list[RequestOutput]:
        """Continue the likeliest beams of a search, or end it with its best outputs."""
        search = live.search
        assert search is not None
        chosen = search.advance()
        if chosen:
            search.branch(chosen, self._scheduler)
            return []
        (request,) = live.sequences
        request.first_token_time = time.monotonic()
        self._on_first_token(request=request)
        texts, reasons = search.texts(self.tokenizer), search.reasons
        last = self._end(request, reasons[0])
        return search.outputs(last, texts, reasons)

    # ---- whole requests

    def generate(
        self, prompts: Sequence[Prompt], params: Spread = None, options: RequestOptions | None = None
    ) -> list[RequestOutput]:
        """Whole outputs of all prompts, in order. One request's failure is in its output, not raised.

        Raises `InvalidArgument` before anything runs if a prompt or its parameters are bad. Prompts beyond
        `max_waiting` are fed as others finish.
        """
        requests = [
            self.make_request(prompt, one, options)
            for prompt, one in zip(prompts, spread(params, prompts), strict=True)
        ]
        todo, wholes = deque(requests), {request.request_id: Whole() for request in requests}
        with self._collecting(requests, wholes):
            while todo or any(request.request_id in self._live for request in requests):
                while todo and len(self._scheduler.waiting) < self.config.max_waiting:
                    self.enqueue(todo.popleft())
                self._advance()
            return [wholes[request.request_id].joined() for request in requests]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, options: RequestOptions | None = None
    ) -> Iterator[RequestOutput]:
        """Outputs of one prompt as they come. Leaving the iterator early aborts the request."""
        request = self.make_request(prompt, params, options)
        outputs: deque[RequestOutput] = deque()
        with self._collecting([request], {request.request_id: outputs}):
            self.enqueue(request)
            while outputs or request.request_id in self._live:
                while not outputs:
                    self._advance()
                yield outputs.popleft()

    @contextlib.contextmanager
    def _collecting(
        self, requests: Sequence[Request], collected: Mapping[str, deque[RequestOutput] | Whole]
    ) -> Iterator[None]:
        """Keep the outputs of these requests for the caller, and abort what is left of them in the end."""
        self._collected.update(collected)
        try:
            yield
        finally:
            for request in requests:
                live = self._live.get(request.request_id)
                for sequence in [] if live is None else list(live.sequences):
                    self._end(sequence, "abort")
                del self._collected[request.request_id]
            if not self._live and self._in_flight:
                self._advance()

    def stats(self) -> EngineStats:
        """Numbers of now; safe to call from another thread."""
        pool, scheduler, host = self.tables.pool, self._scheduler, self._host
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=len(scheduler.waiting),
            blocks_used=pool.num_used,
            blocks_cached=pool.num_cached,
            blocks_total=pool.num_blocks,
            block_size=self.tables.block_size,
            steps=self._steps,
            computed_tokens=self._computed_tokens,
            cached_tokens=scheduler.num_cached_tokens,
            queried_tokens=scheduler.num_queried_tokens,
            output_tokens=self._output_tokens,
            preemptions=scheduler.num_preempted,
            swapped=scheduler.num_swapped,
            blocks_stored=0 if host is None else host.num_stored,
            blocks_fetched=0 if host is None else host.num_fetched,
        )

    def close(self) -> None:
        """Abort what runs, drop the cache, and give the model its own attention back. The engine is dead after."""
        if self.error is None:
            for request_id in list(self._live):
                self.abort(request_id)
            self.error = EngineDead("the engine was closed")
        self._abandon()
        self._runner.close()
        self._paged_model.close()
