"""The wire protocol: what a request's tensors and parameters ask for. Pure; knows nothing of Triton's Python API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paged_backend.errors import DeadlineExceeded, EngineDead, InvalidArgument, Overloaded
from paged_backend.request import SamplingParams

INPUTS = (
    {"name": "text_input", "data_type": "TYPE_STRING", "dims": [1]},
    {"name": "stream", "data_type": "TYPE_BOOL", "dims": [1], "optional": True},
    {"name": "sampling_parameters", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
    {"name": "exclude_input_in_output", "data_type": "TYPE_BOOL", "dims": [1], "optional": True},
)
"""Names, types and meaning are those of Triton's vLLM backend, so its clients work unchanged."""
OUTPUT = {"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]}


class Cancelled(Exception):
    """The client cancelled the request or went away."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What one request asks for."""

    prompt: str
    params: SamplingParams
    stream: bool
    """Send text as it comes, not once at the end."""
    prepend_prompt: bool
    """Begin the answer with the prompt."""


def parse_request(inputs: Mapping[str, Any], parameters: Mapping[str, Any]) -> Generation:
    """Read one request: the values of its one-element `inputs` by name (STRING as bytes) and its request `parameters`.

    Sampling fields come from the request parameters and, overriding those, from the JSON input `sampling_parameters`.
    Unknown request parameters are ignored, since Triton and its clients put keys of their own there (`id`); unknown
    sampling parameters are not. Raises ValueError, nearly always an `InvalidArgument`, for any bad input.
    """
    prompt = _decode("text_input", inputs["text_input"])
    if not prompt:
        raise InvalidArgument("text_input", prompt, "the prompt must have at least one character")
    stream = bool(inputs.get("stream", False))
    exclude_prompt = bool(inputs.get("exclude_input_in_output", stream))
    if stream and not exclude_prompt:
        raise ValueError("When streaming, `exclude_input_in_output` = False is not allowed.")
    sampling = {name: value for name, value in parameters.items() if name in SamplingParams.model_fields}
    if "sampling_parameters" in inputs:
        sampling |= _json_object("sampling_parameters", inputs["sampling_parameters"])
    params = SamplingParams(**sampling)
    for name in ("n", "beam_width"):
        if getattr(params, name) > 1:
            raise InvalidArgument(name, getattr(params, name), "must be 1: this model answers with one text")
    return Generation(prompt, params, stream, prepend_prompt=not exclude_prompt)


def error_code(error: Exception) -> str:
    """The Triton error code, by name, that tells a client what to do about `error`."""
    match error:
        case Cancelled():
            return "CANCELLED"
        case Overloaded() | EngineDead() | DeadlineExceeded():
            return "UNAVAILABLE"
        case ValueError():
            return "INVALID_ARG"
    return "INTERNAL"


def _decode(field: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(field, value, f"must be UTF-8; {error.reason} at byte {error.start}") from None


def _json_object(field: str, value: bytes) -> dict[str, Any]:
    text = _decode(field, value)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(field, text, f"must be JSON; {error}") from None
    if not isinstance(parsed, dict):
        raise InvalidArgument(field, text, "must be a JSON object of sampling parameters")
    return parsed
