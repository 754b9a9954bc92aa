"""The answer to one request, as Triton sends it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from prometheus_client import Counter

from paged_backend.request import RequestOutput
from triton_server_model.protocol import Cancelled, Generation, error_code

logger = logging.getLogger(__name__)


class Reply:
    """Turns one request's outputs into responses, of which exactly one is the final one."""

    def __init__(self, responses: Any, request_id: str, errors: Counter) -> None:
        """`responses` is Triton's response sender, `request_id` the client's or empty; `errors` counts them by code."""
        self.responses, self.request_id, self._errors = responses, request_id, errors
        self.open = True
        """Whether the final response has not been sent."""
        self._stream, self._text = False, ""
        self._trace: Callable[[Sequence[RequestOutput]], None] | None = None

    def begin(self, generation: Generation, trace: Callable[[Sequence[RequestOutput]], None] | None) -> None:
        """What was asked for, before the first output. `trace` is told the outputs, too."""
        self._stream, self._trace = generation.stream, trace
        self._text = generation.prompt if generation.prepend_prompt else ""

    def add(self, outputs: Sequence[RequestOutput]) -> None:
        """Send what came since, in one response; without `stream`, only once all is there."""
        if self._trace is not None:
            self._trace(outputs)
        if not self.open:
            return
        self._text += "".join(output.text for output in outputs)
        last = outputs[-1]
        if last.finish_reason == "abort":
            self.fail(Cancelled("Request was cancelled"))
        elif last.finish_reason == "error":
            self.fail(last.error or RuntimeError("unknown error"))
        elif last.finished:
            self._send(self._tensors(), final=True)
        elif self._stream and self._text:
            self._send(self._tensors(), final=False)

    def fail(self, error: Exception) -> None:
        """End the request with `error`."""
        message = str(error) if isinstance(error, Cancelled) else f"Error generating stream: {error}"
        name = error_code(error)
        self._errors.labels(name).inc()
        if name == "INTERNAL":
            logger.error("the request failed", exc_info=error, extra={"request_id": self.request_id})
        code = getattr(pb_utils.TritonError, name, None)  # servers before 23.11 have no codes
        triton_error = pb_utils.TritonError(message) if code is None else pb_utils.TritonError(message, code)
        self._send([], final=True, error=triton_error)

    def _tensors(self) -> list[Any]:
        text, self._text = self._text, ""
        return [pb_utils.Tensor("text_output", np.array([text.encode()], dtype=np.object_))]

    def _send(self, tensors: list[Any], *, final: bool, error: Any = None) -> None:
        self.open = not final
        response = pb_utils.InferenceResponse(output_tensors=tensors, error=error)
        self.responses.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)
