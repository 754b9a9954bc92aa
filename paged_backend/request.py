"""What a caller asks for (`SamplingParams`), what the engine keeps (`Request`), what it answers (`RequestOutput`)."""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from paged_backend.errors import CheckedModel, InvalidArgument
from paged_backend.kv_cache import hashing
from paged_backend.structured_outputs import StructuredOutputs, parse

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FinishReason = Literal["stop", "length", "abort", "error"]

TokenId = Annotated[int, Field(ge=0)]
StopStrings = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=1024)], ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
]


_NOT_OF_BEAMS = (
    *("temperature", "top_k", "top_p", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "logit_bias", "allowed_token_ids", "bad_words", "structured_outputs"),
    *("logprobs", "prompt_logprobs"),
)


class SamplingParams(CheckedModel):
    """How to choose the tokens of one request. Names and defaults follow vLLM's."""

    n: int = Field(1, ge=1, le=128)
    """Outputs to make of one prompt, whose blocks they share; of a beam search, how many of the best to return."""
    max_tokens: int = Field(16, ge=1)
    """Most tokens to generate; the model's context limits it further."""
    min_tokens: int = Field(0, ge=0)
    """No end-of-sequence, stop token or stop string before this many tokens."""
    temperature: Annotated[float, AfterValidator(lambda value: 0.0 if value < 1e-5 else value)] = Field(
        1.0, ge=0, le=1e4
    )
    """0 is greedy; so is anything below 1e-5, where float32 would overflow."""
    top_k: int = Field(0, ge=-1, lt=2**31)
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the smallest set of most likely tokens whose probabilities sum to at least this."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Keep tokens at least this times as likely as the most likely one."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """Subtracted from the logit of every token that was generated before."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """Subtracted as often as the token was generated before."""
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    """Divides the positive logit, multiplies the negative one, of every token of the prompt or the output."""
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=1024)
    """Added to the logits of these token ids."""
    allowed_token_ids: tuple[TokenId, ...] | None = Field(None, min_length=1, max_length=2**20)
    """No other token is generated. None: all may be."""
    bad_words: StopStrings = Field((), max_length=64)
    """Words that are not generated, as the start of a word or inside one, in the way they are tokenised alone."""
    structured_outputs: Annotated[StructuredOutputs | None, BeforeValidator(parse)] = None
    """What the output has to match: a JSON schema, an expression, choices or a grammar. Also a dict, or its JSON."""
    logprobs: int | None = Field(None, ge=0, le=20)
    """Give the log-probability of each token, and those of the so many likeliest in its place. Of the model itself:
    before temperature, penalties, bias and masks."""
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    """Give them for each token of the prompt, too. Nothing of it is then taken from the prefix cache, or left there."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """Equal seeds repeat equal tokens, whatever else runs. None draws a fresh one."""
    stop: StopStrings = Field((), max_length=64)
    """Strings that end the output; the output stops before the first of them."""
    include_stop_str_in_output: bool = False
    """Stop behind the stop string instead; a stop token's own text is part of the output then, too."""
    stop_token_ids: tuple[TokenId, ...] = Field((), max_length=256)
    """Token ids that end the output like end-of-sequence does."""
    ignore_eos: bool = False
    """Generate past end-of-sequence."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    """Keep only the last so many tokens of the prompt; with -1, as many as the context has room for."""
    beam_width: int = Field(1, ge=1, le=64)
    """More than 1 searches for the likeliest outputs, keeping this many at a time; tokens come when it ends."""
    length_penalty: float = Field(1.0, ge=-10, le=10)
    """A finished beam scores its log-probability divided by its length to this power: larger favours longer ones."""
    early_stopping: bool | Literal["never"] = False
    """When a beam search ends: True, with `beam_width` finished beams; False, when a better one is unlikely; "never",
    when it is impossible. As in transformers."""

    @property
    def penalised(self) -> bool:
        """Whether any penalty is asked for."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @model_validator(mode="after")
    def _consistent(self) -> SamplingParams:
        if self.truncate_prompt_tokens == 0:
            raise InvalidArgument("truncate_prompt_tokens", 0, "must be at least 1, or -1")
        if self.min_tokens > self.max_tokens:
            raise InvalidArgument("min_tokens", self.min_tokens, f"must be at most max_tokens={self.max_tokens}")
        if self.beam_width > 1:
            if self.n > self.beam_width:
                raise InvalidArgument("n", self.n, f"must be at most beam_width={self.beam_width}")
            for name in _NOT_OF_BEAMS:
                value, unset = getattr(self, name), SamplingParams.model_fields[name].default
                if value != unset and (name, value) != ("temperature", 0.0):
                    raise InvalidArgument(name, value, f"must be {unset!r} with beam_width > 1, which does not sample")
        return self


class RequestOptions(CheckedModel):
    """How to treat one request; none of it changes its tokens."""

    priority: int = Field(0, ge=-1000, le=1000)
    """Smaller is more urgent, under `scheduling_policy="priority"`."""
    tenant: str = Field("", max_length=256)
    """Whose request it is, under `scheduling_policy="fair-share"` and with `isolate_tenants`."""
    cache_salt: str | None = Field(None, max_length=1024)
    """Only requests with an equal salt share cached prefixes. None: all without one, if `enable_prefix_caching`.
    With `EngineConfig.isolate_tenants`, only those of one tenant."""
    queue_timeout: float | None = Field(None, gt=0)
    """Seconds it may wait for its first slot; then it ends with `DeadlineExceeded`. None: `EngineConfig`'s."""
    timeout: float | None = Field(None, gt=0)
    """Seconds it may take in all; then it ends with `DeadlineExceeded` and what it has, which over Triton only streams
    are sent. None: `EngineConfig`'s."""


class Grammar(Protocol):
    """The grammar of one output, and where in it the output is."""

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        """Set the bits of the tokens that may come next: token t is bit `t % 32` of word `t // 32`; `row` is zeros.

        Stop tokens may come where the output matches. Never raises.
        """
        ...

    def accept(self, token: int) -> None:
        """The next token of the output. Raises ValueError if it may not come here."""
        ...

    def copy(self) -> Grammar:
        """For another output, which is as far as this one."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether the output matches, and nothing may follow, as far as `accept` and `fill` have found out."""
        ...

    @property
    def error(self) -> Exception | None:
        """Why `fill` could not work out which tokens may come next, and allowed none."""
        ...


class RequestStatus(enum.Enum):
    """Life of a request: WAITING -> RUNNING -> (WAITING on preemption -> RUNNING)* -> one of the three ends."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"
    FAILED = "failed"


_ENDS = {
    "stop": RequestStatus.FINISHED,
    "length": RequestStatus.FINISHED,
    "abort": RequestStatus.ABORTED,
    "error": RequestStatus.FAILED,
}


@dataclass(slots=True, eq=False)
class Request:
    """One accepted request. Owned by the engine; plugins may read it."""

    request_id: str
    token_ids: list[int]
    """The prompt, then the output so far."""
    num_prompt_tokens: int
    params: SamplingParams
    max_total_tokens: int
    """Prompt and output together never exceed this."""
    stop_token_ids: frozenset[int]
    """End-of-sequence (unless ignored) and stop tokens."""
    seed: int
    index: int = 0
    """Which of the request's `n` outputs, or of its beams."""
    priority: int = 0
    tenant: str = ""
    hash_root: bytes = b""
    """Where the hashes of its blocks begin; only requests with an equal one share blocks."""
    queue_deadline: float = math.inf
    """`time.monotonic()` by which it must have had a slot."""
    deadline: float = math.inf
    """`time.monotonic()` by which it must have ended."""
    steered: bool = False
    """Its next token is chosen from outside, among `beam_width` candidates: a beam."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Tokens that are not generated one after the other."""
    grammar: Grammar | None = None
    """What its output has to match; it knows the output so far."""
    arrival_index: int = 0
    """Order of arrival in this engine."""
    arrival_time: float = field(default_factory=time.monotonic)
    status: RequestStatus = RequestStatus.WAITING
    sort_key: Any = None
    """The scheduling policy's key; None before the first wait."""
    slot: int = -1
    """Row of the batch state while running, else -1."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Of the full blocks of `token_ids`, as far as they were needed."""
    swapped: list[int] = field(default_factory=list)
    """Host blocks held while preempted."""
    num_cached_tokens: int | None = None
    """Prompt tokens that were in the cache at the first slot, and not computed."""
    num_preemptions: int = 0
    scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float = 0.0
    end_time: float | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    cumulative_logprob: float | None = None
    """Of the output so far, if `logprobs` were asked for."""
    prompt_logprobs: list[list[Logprob]] | None = None
    """Of each token of the prompt, as far as it is computed; None unless asked for."""

    @property
    def runs_alone(self) -> bool:
        """Whether its next step can only be launched when all its tokens are on the host."""
        return self.steered or self.grammar is not None or any(len(word) > 1 for word in self.bad_words)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def rank(self) -> tuple[Any, int]:
        """Its place in the order of service; smaller goes first."""
        return self.sort_key, self.arrival_index

    def hash_blocks(self, block_size: int) -> None:
        """Bring `block_hashes` up to date with `token_ids`."""
        hashing.extend(self.block_hashes, self.hash_root, self.token_ids, block_size)

    @property
    def ended(self) -> bool:
        """Whether the request is finished, aborted or failed."""
        return self.finish_reason is not None

    def end(self, reason: FinishReason, error: Exception | None = None) -> None:
        """Enter the one final state. Raises RuntimeError on a second end: that would be an engine bug."""
        if self.ended:
            raise RuntimeError(f"request {self.request_id} ended twice: {self.finish_reason}, then {reason}")
        self.status, self.finish_reason, self.error = _ENDS[reason], reason, error
        self.end_time = time.monotonic()


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token in one place of an output."""

    token_id: int
    logprob: float
    """Natural logarithm."""
    rank: int
    """1 is the likeliest of the vocabulary."""
    text: str
    """Of this token alone; characters that it has only a part of are U+FFFD. "" without a tokenizer."""


@dataclass(slots=True)  # not frozen: one is made for every token, and that would take twice as long
class RequestOutput:
    """What became of a request since the previous output (streaming), or in all (`generate`)."""

    request_id: str
    text: str
    """Never ends inside a character; held back while it could be the start of a stop string. "" without a tokenizer."""
    token_ids: list[int]
    num_prompt_tokens: int
    num_output_tokens: int
    """In all, not only in this output."""
    finish_reason: FinishReason | None = None
    """None while this output is made."""
    error: Exception | None = None
    """The cause, when `finish_reason` is "error"."""
    finished: bool = False
    """Whether this is the last of the request: all its `n` outputs are made."""
    index: int = 0
    """Which of the request's `n` outputs this belongs to."""
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the cache and not computed."""
    score: float | None = None
    """Of a beam: its log-probability over its length to the power `length_penalty`."""
    logprobs: list[list[Logprob]] | None = None
    """For each of `token_ids`: the token itself, then the likeliest in its place, as many as `SamplingParams.logprobs`
    says, in order. None unless asked for."""
    cumulative_logprob: float | None = None
    """Sum over all tokens of this output so far. None unless `logprobs` were asked for, or it is a beam."""
    prompt_logprobs: list[list[Logprob]] | None = None
    """As `logprobs`, for each token of the prompt, [] for the first; with the first token. None unless asked for."""
    arrival_time: float = 0.0
    """`time.monotonic()` seconds."""
    scheduled_time: float | None = None
    """When it got its first slot."""
    first_token_time: float | None = None
    end_time: float | None = None
    samples: tuple[RequestOutput, ...] = ()
    """In whole outputs of a request with `n` > 1: all of them; the other fields are those of the first."""


OutputCallback = Callable[[RequestOutput], None]
