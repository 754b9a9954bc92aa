"""What a caller asks for (`SamplingParams`), what the engine keeps (`Request`), what it answers (`RequestOutput`)."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from paged_backend.errors import CheckedModel, InvalidArgument

FinishReason = Literal["stop", "length", "abort", "error"]

StopStrings = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=1024)], ...],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
]


class SamplingParams(CheckedModel):
    """How to choose the tokens of one request. Names and defaults follow vLLM's."""

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
    seed: int | None = Field(None, ge=0, lt=2**63)
    """Equal seeds repeat equal tokens, whatever else runs. None draws a fresh one."""
    stop: StopStrings = Field((), max_length=64)
    """Strings that end the output; the output stops before the first of them."""
    stop_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field((), max_length=256)
    """Token ids that end the output like end-of-sequence does."""
    ignore_eos: bool = False
    """Generate past end-of-sequence."""

    @model_validator(mode="after")
    def _consistent(self) -> SamplingParams:
        if self.min_tokens > self.max_tokens:
            raise InvalidArgument("min_tokens", self.min_tokens, f"must be at most max_tokens={self.max_tokens}")
        return self


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
    arrival_index: int = 0
    """Order of arrival in this engine."""
    arrival_time: float = field(default_factory=time.monotonic)
    status: RequestStatus = RequestStatus.WAITING
    slot: int = -1
    """Row of the batch state while running, else -1."""
    num_computed_tokens: int = 0
    """Tokens whose K/V are in the cache, or will be after the step being run."""
    num_preemptions: int = 0
    scheduled_time: float | None = None
    first_token_time: float | None = None
    end_time: float | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

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


@dataclass(slots=True, frozen=True)
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
    """None while the request runs."""
    error: Exception | None = None
    """The cause, when `finish_reason` is "error"."""
    arrival_time: float = 0.0
    """`time.monotonic()` seconds."""
    first_token_time: float | None = None
    end_time: float | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the request's last output."""
        return self.finish_reason is not None


OutputCallback = Callable[[RequestOutput], None]
