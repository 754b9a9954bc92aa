"""The answer to one request, as Triton sends it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils
from prometheus_client import Counter

from paged_backend.errors import InvalidArgument
from paged_backend.request import Logprob, RequestOutput
from triton_server_model.protocol import Cancelled, Generation, error_code

logger = logging.getLogger(__name__)

_REASONS = ("stop", "length")
"""Those that clients are told; an output that ends for another ends the request with an error."""


@dataclass(slots=True)
class _Sequence:
    """What is to be sent of one of the request's `n` outputs."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[list[Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str = "None"

    def add(self, output: RequestOutput) -> None:
        """What came after it."""
        self.text += output.text
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or ()
        self.cumulative_logprob = output.cumulative_logprob or self.cumulative_logprob
        if output.finish_reason in _REASONS:
            self.finish_reason = output.finish_reason

    def sent(self) -> None:
        """Forget what is to come once only."""
        self.text = ""
        self.token_ids.clear()
        self.logprobs.clear()


class Reply:
    """Turns one request's outputs into responses, of which exactly one is the final one."""

    def __init__(self, responses: Any, request_id: str, errors: Counter) -> None:
        """`responses` is Triton's response sender, `request_id` the client's or empty; `errors` counts them by code."""
        self.responses, self.request_id, self._errors = responses, request_id, errors
        self.open = True
        """Whether the final response has not been sent."""
        self._trace: Callable[[Sequence[RequestOutput]], None] | None = None
        self._stream, self._asked, self._logprobs = False, tuple[str, ...](), False
        self._prompt_input, self._prompt_logprobs = "text_input", list[list[Logprob]]()
        self._num_prompt_tokens = self._num_cached_tokens = 0
        self._sequences: list[_Sequence] = []

    def begin(self, generation: Generation, trace: Callable[[Sequence[RequestOutput]], None] | None) -> None:
        """What was asked for, before the first output. `trace` is told the outputs, too."""
        self._trace = trace
        self._stream, self._asked = generation.stream, generation.asked
        self._logprobs = generation.params.logprobs is not None
        self._prompt_input = generation.prompt_input
        self._sequences = [_Sequence(generation.prefix) for _ in range(generation.params.n)]

    def add(self, outputs: Sequence[RequestOutput]) -> None:
        """Send what came since, in one response; without `stream`, once all is there, and nothing before an error."""
        if self._trace is not None:
            self._trace(outputs)
        if not self.open:
            return
        ended, failure = False, None
        for output in outputs:
            self._sequences[output.index].add(output)
            self._prompt_logprobs += output.prompt_logprobs or ()
            self._num_prompt_tokens = output.num_prompt_tokens or self._num_prompt_tokens
            if output.index == 0:  # others find what it has just computed
                self._num_cached_tokens = output.num_cached_tokens
            ended |= output.finish_reason in _REASONS
            if output.finish_reason in ("abort", "error"):
                failure = failure or output.error or Cancelled("Request was cancelled")
        final = outputs[-1].finished and failure is None
        if final or (self._stream and (ended or any(map(self._has_news, self._sequences)))):
            self._send(self._tensors(), final=final)
        if failure is not None:
            self.fail(failure)

    def fail(self, error: Exception) -> None:
        """End the request with `error`."""
        if isinstance(error, InvalidArgument):  # the engine's prompt is one of the inputs
            named = re.sub(r"^prompt(?=$|\[)", self._prompt_input, error.field)
            error = InvalidArgument(named, error.value, error.allowed)
        message = str(error) if isinstance(error, Cancelled) else f"Error generating stream: {error}"
        code = error_code(error)
        self._errors.labels(code).inc()
        if code == "INTERNAL":
            logger.error("the request failed", exc_info=error, extra={"request_id": self.request_id})
        self.open = False
        send_error(self.responses, message, code)

    def _has_news(self, sequence: _Sequence) -> bool:
        """Whether it is worth a response. The tokens of text that is held back wait for it, unless asked for."""
        by_token = "output_token_ids" in self._asked or "logprobs" in self._asked
        return bool(sequence.text or (by_token and sequence.token_ids))

    def _tensors(self) -> list[Any]:
        tensors = [pb_utils.Tensor(name, self._values(name)) for name in ("text_output", *self._asked)]
        for sequence in self._sequences:
            sequence.sent()
        self._prompt_logprobs.clear()
        return tensors

    def _values(self, name: str) -> npt.NDArray[Any]:
        """Of one output tensor; `protocol_table.OUTPUTS` says what each has."""
        sequences = self._sequences
        match name:
            case "text_output":
                return _strings(sequence.text for sequence in sequences)
            case "finish_reason":
                return _strings(sequence.finish_reason for sequence in sequences)
            case "cumulative_logprob":
                return np.array([sequence.cumulative_logprob for sequence in sequences], dtype=np.float32)
            case "logprobs":
                return _strings(_json(sequence.logprobs) if self._logprobs else "null" for sequence in sequences)
            case "num_input_tokens":
                return np.array([self._num_prompt_tokens], dtype=np.uint32)
            case "num_cached_tokens":
                return np.array([self._num_cached_tokens], dtype=np.uint32)
            case "num_output_tokens":
                return np.array([len(sequence.token_ids) for sequence in sequences], dtype=np.uint32)
            case "output_token_ids":
                return np.array([token for sequence in sequences for token in sequence.token_ids], dtype=np.int32)
            case "prompt_logprobs":
                return _strings([_json(self._prompt_logprobs) if self._prompt_logprobs else "null"])
        raise NotImplementedError(name)

    def _send(self, tensors: list[Any], *, final: bool) -> None:
        self.open = not final
        response = pb_utils.InferenceResponse(output_tensors=tensors)
        self.responses.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)


def send_error(responses: Any, message: str, code: str) -> None:
    """The final response of a request that failed; `code` is the name of one of Triton's."""
    message = message.encode(errors="backslashreplace").decode()  # a JSON key may be half a surrogate pair
    known = getattr(pb_utils.TritonError, code, None)  # servers before 23.11 have no codes
    error = pb_utils.TritonError(message) if known is None else pb_utils.TritonError(message, known)
    responses.send(pb_utils.InferenceResponse([], error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _strings(texts: Iterable[str]) -> npt.NDArray[np.object_]:
    return np.array([text.encode() for text in texts], dtype=np.object_)


def _json(tokens: Sequence[Sequence[Logprob]]) -> str:
    """As vLLM's backend: by token id, so the token itself, which comes first, is not repeated among the likeliest."""
    return json.dumps(
        [
            {one.token_id: {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.text} for one in likeliest}
            for likeliest in tokens
        ]
    )
