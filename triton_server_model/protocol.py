"""The wire protocol: what a request's tensors and parameters ask for. Pure; knows nothing of Triton's Python API."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paged_backend.errors import CheckedModel, DeadlineExceeded, EngineDead, InvalidArgument, Overloaded
from paged_backend.request import RequestOptions, SamplingParams
from paged_backend.text.chat import Chat
from triton_server_model.protocol_table import NAMES, OUTPUTS, Name, WireOptions

if TYPE_CHECKING:
    from paged_backend.intake import Prompt

_NAMES = {name.name: name for name in NAMES}
_SPOKEN = {name.name: name for name in NAMES if name.parameter}
_PREFIXES = tuple(name.removesuffix("*") for name in _NAMES if name.endswith("*"))
_PROMPTS = ("text_input", "prompt_token_ids", "messages")
_ID_LISTS = ("stop_token_ids", "allowed_token_ids")
_OBJECTS = ("logit_bias", "structured_outputs")
_COUNTS = ("logprobs", "prompt_logprobs")
_NOT_SCALAR = ("stop", "bad_words", *_ID_LISTS, *_OBJECTS)
_GUIDES = {"json_schema": "json", "regex": "regex", "ebnf_grammar": "grammar"}


class Cancelled(Exception):
    """The client cancelled the request or went away."""


class Refused(ValueError):
    """Bad input, in the words of vLLM's backend."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What one request asks for."""

    prompt: Prompt
    params: SamplingParams
    options: RequestOptions
    stream: bool
    """Send text as it comes, not once at the end."""
    prefix: str
    """What the answer begins with: the prompt, or nothing."""
    asked: tuple[str, ...]
    """The outputs to send beside the text, by name."""
    prompt_input: str
    """The input tensor that has the prompt."""
    unknown: tuple[str, ...]
    """Request parameters and keys of `sampling_parameters` that mean nothing here."""


def parse_request(inputs: Mapping[str, Sequence[Any]], parameters: Mapping[str, Any], timeout: int = 0) -> Generation:
    """Read one request: the elements of its tensors by name (STRING as bytes), and its request `parameters`.

    `timeout` is Triton's own, in microseconds; 0 is none. Raises `InvalidArgument` or `Refused` for bad input.
    `protocol_table` has all names.
    """
    tensors = {name: _value(_NAMES[name], elements) for name, elements in inputs.items()}
    tensors = {name: value for name, value in tensors.items() if value not in ("", [])}
    prompt, prompt_input = _prompt(tensors)
    spoken = _json(dict, "sampling_parameters", tensors.pop("sampling_parameters", "{}"))
    unknown = [name for name in {**parameters, **spoken} if not (name in _SPOKEN or name.startswith(_PREFIXES))]
    fields = _fields(parameters) | _fields(spoken) | _fields(tensors, _NAMES)

    wire = WireOptions(**_of(WireOptions, fields))
    params = _completed(SamplingParams(**_guided(wire, _of(SamplingParams, fields))), wire)
    # On the wire, timeouts are no seconds.
    options: dict[str, Any] = {name: fields[name] for name in ("priority", "tenant", "cache_salt") if name in fields}
    if milliseconds := wire.timeout_ms or (wire.timeout or timeout) / 1000:
        options["timeout"] = milliseconds / 1000
    if wire.queue_timeout_ms:
        options["queue_timeout"] = wire.queue_timeout_ms / 1000
    return Generation(
        prompt,
        params,
        RequestOptions(**options),
        wire.stream and params.beam_width == 1,  # a beam search has nothing to send before its end
        _prefix(wire, prompt),
        tuple(output.name for output in OUTPUTS if getattr(wire, f"return_{output.name}", False))
        + (("prompt_logprobs",) if params.prompt_logprobs is not None else ()),
        prompt_input,
        tuple(unknown),
    )


def error_code(error: Exception) -> str:
    """The Triton error code, by name, that tells a client what to do about `error`."""
    match error:
        case Cancelled():
            return "CANCELLED"
        # Triton has no code for a deadline: its own queue says UNAVAILABLE of a request whose time is over.
        case Overloaded() | EngineDead() | DeadlineExceeded():
            return "UNAVAILABLE"
        case InvalidArgument() | Refused():  # no other ValueError: that is a fault of ours
            return "INVALID_ARG"
    return "INTERNAL"


def _value(name: Name, elements: Sequence[Any]) -> Any:
    """Of one tensor: a list, without empty strings, if it may have any number of elements."""
    values = [decoded(name.name, one) if isinstance(one, bytes) else one for one in elements]
    return [value for value in values if value != ""] if name.tensor.endswith("[-1]") else values[0]


def decoded(field: str, value: bytes) -> str:
    """The text that `value` of an input is. Raises `InvalidArgument`."""
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(field, value, f"must be UTF-8; {error.reason} at byte {error.start}") from None


def _prompt(tensors: dict[str, Any]) -> tuple[Prompt, str]:
    """The prompt, taken out of `tensors`, and which of them had it."""
    given = {name: tensors.pop(name) for name in _PROMPTS if name in tensors}
    if not given:
        raise InvalidArgument(
            "text_input", "", "the prompt must have at least one character; or send prompt_token_ids or messages"
        )
    (name, value), *others = given.items()
    for other, other_value in others:
        raise InvalidArgument(other, other_value, f"not together with {name}: a request has one prompt")
    for beside in ("tools", "chat_template_kwargs"):
        if name != "messages" and beside in tensors:
            raise InvalidArgument(beside, tensors[beside], "only allowed with messages")
    if name == "messages":
        tools = _objects("tools", tensors.pop("tools")) if "tools" in tensors else None
        variables = _json(dict, "chat_template_kwargs", tensors.pop("chat_template_kwargs", "{}"))
        return Chat(_objects(name, value), tools, variables), name
    return value, name


def _prefix(wire: WireOptions, prompt: Prompt) -> str:
    if wire.stream and wire.exclude_input_in_output is False:
        raise Refused("When streaming, `exclude_input_in_output` = False is not allowed.")
    if isinstance(prompt, str):
        excluded = wire.stream if wire.exclude_input_in_output is None else wire.exclude_input_in_output
        return "" if excluded else prompt
    if wire.exclude_input_in_output is False:
        raise InvalidArgument("exclude_input_in_output", False, "only a text_input can be in the output")
    return ""


def _fields(values: Mapping[str, Any], known: Mapping[str, Name] = _SPOKEN) -> dict[str, Any]:
    """What one place asks for, by field; null is not given.

    Raises `InvalidArgument` for what is refused, or there under two names.
    """
    fields, names = {}, dict[str, str]()
    for key, value in values.items():
        name = known.get(key)
        if name is None or value is None or name.status == "ignored":
            continue
        if name.status == "refused":
            if name.asks(value):
                hint = f"; {name.meaning}" if name.meaning else ""
                raise InvalidArgument(key, value, f"not supported by this model{hint}")
            continue
        field = name.field or key
        if value == "" and field in _NOT_SCALAR:
            continue
        if field in fields:
            raise InvalidArgument(key, value, f"not together with {names[field]}, which means the same")
        names[field] = key
        fields[field] = _coerced(field, value)
    return fields


def _of(model: type[CheckedModel], fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name in model.model_fields}


def _coerced(field: str, value: Any) -> Any:
    """Lists and objects from the scalars that request parameters can be; pydantic does the rest."""
    if field in _COUNTS and str(value).lower() == "false":  # of Triton's OpenAI front end; it means none, not 0
        return None
    if field in _OBJECTS and isinstance(value, str):
        return _json(dict, field, value)
    if field in _ID_LISTS and type(value) in (str, int):
        parsed = _json(list | int, field, value) if isinstance(value, str) else value
        return (parsed,) if isinstance(parsed, int) else parsed
    return value


def _guided(wire: WireOptions, sampling: dict[str, Any]) -> dict[str, Any]:
    """With TensorRT-LLM's guide as `structured_outputs`."""
    kind, guide = wire.guided_decoding_guide_type, wire.guided_decoding_guide
    if kind in ("", "none"):
        return sampling
    if sampling.get("structured_outputs"):
        raise InvalidArgument("guided_decoding_guide_type", kind, "not together with structured_outputs")
    if kind == "json":
        return sampling | {"structured_outputs": {"json_object": True}}
    if not guide:
        raise InvalidArgument("guided_decoding_guide", guide, f"guided_decoding_guide_type={kind!r} needs one")
    return sampling | {"structured_outputs": {_GUIDES[kind]: guide}}


def _completed(params: SamplingParams, wire: WireOptions) -> SamplingParams:
    """With what the outputs and `end_id` need."""
    more: dict[str, Any] = {}
    if wire.return_cumulative_logprob and params.logprobs is None and params.beam_width == 1:  # beams have it anyhow
        more["logprobs"] = 0
    if wire.end_id is not None and wire.end_id >= 0 and not params.ignore_eos:
        more["stop_token_ids"] = (*params.stop_token_ids, wire.end_id)
    return params.model_copy(update=more) if more else params


def _objects(field: str, text: str) -> list[dict[str, Any]]:
    parsed: list[dict[str, Any]] = _json(list, field, text)
    if not parsed or not all(isinstance(one, dict) for one in parsed):
        raise InvalidArgument(field, text, "must be a JSON list of objects, with one at least")
    return parsed


def _json(kind: Any, field: str, text: str) -> Any:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(field, text, f"must be JSON; {error}") from None
    if not isinstance(parsed, kind):
        name = {dict: "object", list: "list"}.get(kind, "list of token ids")
        raise InvalidArgument(field, text, f"must be a JSON {name}")
    return parsed
