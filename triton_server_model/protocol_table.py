"""Every name of the wire protocol, once: it is parsed by this table, and `docs/protocol.md` is printed from it.

`python -m triton_server_model.protocol_table > docs/protocol.md`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field

from paged_backend.errors import CheckedModel
from paged_backend.request import RequestOptions, SamplingParams

Dialect = Literal["vLLM", "TensorRT-LLM", "TGI", "Triton", "own"]
"""Whose name it was first."""
_NOTHING = frozenset({"", "0", "0.0", "false", "none", "null", "[]", "{}"})


class WireOptions(CheckedModel):
    """What a request may ask for beside `SamplingParams` and `RequestOptions`."""

    stream: bool = False
    """Send text as it comes, not once at the end. Of beams, all comes at the end."""
    exclude_input_in_output: bool | None = None
    """Whether the answer does not begin with `text_input`; without it, only a stream does not."""
    return_finish_reason: bool = False
    """Send `finish_reason`."""
    return_cumulative_logprob: bool = False
    """Send `cumulative_logprob`."""
    return_logprobs: bool = False
    """Send `logprobs`."""
    return_num_input_tokens: bool = False
    """Send `num_input_tokens`."""
    return_num_cached_tokens: bool = False
    """Send `num_cached_tokens`."""
    return_num_output_tokens: bool = False
    """Send `num_output_tokens`."""
    return_output_token_ids: bool = False
    """Send `output_token_ids`."""
    timeout_ms: float = Field(0, ge=0, le=1e12)
    """Milliseconds the request may take in all; 0 is no limit."""
    queue_timeout_ms: float = Field(0, ge=0, le=1e12)
    """Milliseconds it may wait for its first slot; 0 is no limit."""
    timeout: int = Field(0, ge=0, le=10**15)
    """Microseconds, as in the clients' own `timeout=`, which counts where this is 0; `timeout_ms` goes before both."""
    end_id: int | None = None
    """One more stop token, unless `ignore_eos`. A token that the vocabulary lacks never comes."""
    guided_decoding_guide_type: Literal["", "none", "json", "json_schema", "regex", "ebnf_grammar"] = "none"
    """What `guided_decoding_guide` is; "json" is any JSON object, and needs none. Same as `structured_outputs`."""
    guided_decoding_guide: str = ""
    """A JSON schema, a regular expression or a grammar."""


@dataclass(frozen=True, slots=True)
class Name:
    """One name that a request may use."""

    name: str
    meaning: str
    dialect: Dialect = "vLLM"
    status: Literal["served", "refused", "ignored"] = "served"
    """Refused: only with a value that asks for something."""
    type: str = "string"
    default: str = ""
    tensor: str = ""
    """Triton's type and dimensions, if there is an input tensor of that name."""
    parameter: bool = True
    """Whether it may be a request parameter and a key of `sampling_parameters`."""
    field: str = ""
    """The name in whose place it stands; its own unless it is an alias."""
    nothing: frozenset[str] = _NOTHING
    """Values, as lower-case text, with which a refused name asks for nothing."""

    def asks(self, value: object) -> bool:
        """Whether `value`, of a refused name, asks for something."""
        return str(value).strip().lower() not in self.nothing


_TENSORS = {
    **dict.fromkeys(["stop", "bad_words"], "STRING [-1]"),
    **dict.fromkeys(["stop_token_ids", "allowed_token_ids"], "INT32 [-1]"),
    **{name: "BOOL [1]" for name in WireOptions.model_fields if name.startswith(("stream", "exclude_", "return_"))},
}
_FIRST_ELSEWHERE: dict[str, Dialect] = {
    **dict.fromkeys(["beam_width", "length_penalty", "early_stopping", "end_id"], "TensorRT-LLM"),
    **dict.fromkeys(["guided_decoding_guide_type", "guided_decoding_guide"], "TensorRT-LLM"),
    **dict.fromkeys(["priority", "timeout"], "Triton"),
    **dict.fromkeys(["tenant", "cache_salt", "timeout_ms", "queue_timeout_ms"], "own"),
    **dict.fromkeys(["return_num_cached_tokens", "return_output_token_ids"], "own"),
}


def _fields(model: type[BaseModel], *, without: tuple[str, ...] = ()) -> tuple[Name, ...]:
    properties = model.model_json_schema()["properties"]
    return tuple(
        Name(
            name,
            " ".join((field.description or "").split()),
            _FIRST_ELSEWHERE.get(name, "vLLM"),
            type=_type(properties[name]),
            default=_shown(field.default),
            tensor=_TENSORS.get(name, ""),
        )
        for name, field in model.model_fields.items()
        if name not in without
    )


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in words, with its range."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(one) for one in schema["anyOf"] if one != {"type": "null"}))
    for key in ("const", "enum"):
        if key in schema:
            values = schema[key] if key == "enum" else [schema[key]]
            return ", ".join(f'"{value}"' for value in values)
    kind = schema.get("type", "object")
    kind = {"integer": "int", "number": "float", "boolean": "bool"}.get(kind, kind)
    if kind == "array":
        return f"list of {_type(schema['items'])}"
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    bounds = "" if low is None else f" {'>' if 'exclusiveMinimum' in schema else '≥'} {low:g}"
    if high is not None:
        bounds += f"{',' if bounds else ''} {'<' if 'exclusiveMaximum' in schema else '≤'} {high:g}"
    return f"{kind}{bounds}"


def _shown(value: object) -> str:
    return "" if value in (None, "", (), {}) else str(value).lower() if isinstance(value, bool) else str(value)


def _alias(name: str, field: str, dialect: Dialect = "TensorRT-LLM", tensor: str = "") -> Name:
    return Name(name, f"`{field}`", dialect, field=field, tensor=tensor)


def _refused(name: str, dialect: Dialect, instead: str = "", nothing: frozenset[str] = _NOTHING) -> Name:
    return Name(name, instead, dialect, "refused", nothing=nothing)


_ON = frozenset({"", "1", "true"})

NAMES = (
    Name("text_input", "The prompt.", tensor="STRING [1]", parameter=False),
    Name("prompt_token_ids", "The prompt, as token ids.", "own", type="ints", tensor="INT32 [-1]", parameter=False),
    Name(
        "messages",
        "The prompt, as a JSON list of chat messages with `role` and `content`, for the tokenizer's chat template.",
        "own",
        tensor="STRING [1]",
        parameter=False,
    ),
    Name("tools", "A JSON list of tools for the chat template to show.", "own", tensor="STRING [1]", parameter=False),
    Name(
        "chat_template_kwargs",
        "A JSON object of further variables of the chat template.",
        "own",
        tensor="STRING [1]",
        parameter=False,
    ),
    Name("sampling_parameters", "A JSON object of the names below.", tensor="STRING [1]", parameter=False),
    *_fields(WireOptions),
    *_fields(SamplingParams),
    *_fields(RequestOptions, without=("timeout", "queue_timeout")),
    _alias("stop_words", "stop", tensor="STRING [-1]"),
    _alias("min_length", "min_tokens"),
    _alias("random_seed", "seed"),
    _alias("num_return_sequences", "n"),
    _alias("max_new_tokens", "max_tokens", "TGI"),
    _alias("guided_decoding", "structured_outputs", "vLLM"),
    Name("image", "", status="refused", tensor="STRING [-1]", parameter=False),
    Name("embedding_request", "", status="refused", tensor="STRING [1]", parameter=False),
    _refused("best_of", "vLLM", "send n", _NOTHING | {"1"}),
    _refused("use_beam_search", "vLLM", "send beam_width"),
    _refused("detokenize", "vLLM", "return_output_token_ids sends token ids beside the text", _ON | {"none"}),
    _refused("spaces_between_special_tokens", "vLLM", nothing=_ON | {"none"}),
    *(_refused(name, "vLLM") for name in ("lora_name", "logits_processors", "extra_args")),
    _refused("return_log_probs", "TensorRT-LLM", "send return_logprobs or return_cumulative_logprob"),
    *(
        _refused(name, "TensorRT-LLM")
        for name in (
            *("return_context_logits", "return_generation_logits", "return_perf_metrics"),
            *("embedding_bias_words", "embedding_bias_weights", "beam_search_diversity_rate"),
            *("lora_task_id", "lora_weights", "lora_config", "lora_id", "lora_path"),
            *("prompt_embedding_table", "prompt_vocab_size", "prompt_table_extra_id"),
            *("num_draft_tokens", "use_draft_logits", "decoder_text_input"),
            *("image_input", "image_bytes_input", "image_url_input", "video_bytes_input"),
        )
    ),
    Name("pad_id", "Nothing is padded.", "TensorRT-LLM", "ignored"),
    Name("accumulate_tokens", "Text is always detokenised with what came before it.", "TensorRT-LLM", "ignored"),
    *(
        Name(name, "For Triton, or put there by it or its clients.", "Triton", "ignored")
        for name in ("id", "binary_data_output", "headers", "sequence_id", "sequence_start", "sequence_end", "triton_*")
    ),
)


@dataclass(frozen=True, slots=True)
class Output:
    """One output tensor."""

    name: str
    tensor: str
    meaning: str


OUTPUTS = (
    Output("text_output", "STRING [-1]", 'One text for each of the `n` outputs; "" where a stream has nothing new.'),
    Output("finish_reason", "STRING [-1]", 'Of each output: "None" until it has ended, then "stop" or "length".'),
    Output(
        "cumulative_logprob",
        "FP32 [-1]",
        "Of each output: the sum of its tokens' log-probabilities so far; asks for `logprobs=0`, if for nothing more.",
    ),
    Output(
        "logprobs",
        "STRING [-1]",
        "Of each output, JSON: for each new token an object "
        '`{token_id: {"logprob": ..., "rank": ..., "decoded_token": ...}}` of itself and then the likeliest in its '
        'place; "null" unless `logprobs` was asked for.',
    ),
    Output("num_input_tokens", "UINT32 [1]", "Tokens of the prompt."),
    Output("num_cached_tokens", "UINT32 [1]", "Those of them that were in the prefix cache, and not computed."),
    Output("num_output_tokens", "UINT32 [-1]", "Of each output: how many tokens are new in this response."),
    Output(
        "output_token_ids",
        "INT32 [-1]",
        "New tokens of the first output, then those of the second, ...: `num_output_tokens` says where each ends.",
    ),
    Output(
        "prompt_logprobs",
        "STRING [1]",
        "JSON, as `logprobs`, of the prompt's tokens, the first of which has none; sent if the parameter "
        '`prompt_logprobs` was, with the first text, and "null" later.',
    ),
)


def declaration(name: Name | Output) -> dict[str, Any]:
    """A tensor, as Triton's configuration has it."""
    kind, _, size = name.tensor.partition(" ")
    declared = {"name": name.name, "data_type": f"TYPE_{kind}", "dims": [int(size.strip("[]"))]}
    return declared | ({"optional": True} if isinstance(name, Name) else {})


_INTRODUCTION = """\
# The wire protocol

Printed by `python -m triton_server_model.protocol_table`; the same table parses requests.

The tensors are those of Triton's vLLM backend: `max_batch_size` 0, decoupled, one prompt a request. Every name but the
prompt's may come from three places, of which the first one that has it counts: an input tensor, a key of the JSON
object `sampling_parameters`, a request parameter (over HTTP `generate`: any other key of the body or of its
`parameters`). Two names for one thing in one place are refused.

Numbers and booleans may be strings (`"0.1"`, `"false"`). As request parameters, which are scalars, lists of token ids
and objects are JSON in a string, and a list of one string is that string; an empty string asks for nothing, and so does
null in `sampling_parameters`. Unknown names are ignored, logged once, and counted in
`paged_backend_unknown_parameters_total{name}`: Triton, proxies and clients send keys of their own.

A request has exactly one prompt: `text_input`, `prompt_token_ids` or `messages`. Only `text_input` can be prepended to
the answer.
"""
_ERRORS = """\
## Errors

A request that fails has the error as its last response; others go on. HTTP answers 400 to all. Over gRPC the code
comes only to clients that send the header `triton_grpc_error: true`: measured on tritonserver 2.51, that makes the
server crash now and then (SIGSEGV) when errors come on several streams; and there a model that calls this one sees
INTERNAL for all. So tell errors apart by their messages, on that release.

| code | when |
| --- | --- |
| INVALID_ARG | bad input: the message has field, value and what is allowed |
| UNAVAILABLE | the server is overloaded (`max_waiting`), the engine has died, or the request's time is over |
| CANCELLED | the client cancelled |
| INTERNAL | anything else; the server's log has the traceback |
"""


def document() -> str:
    """`docs/protocol.md`."""

    def names(title: str, chosen: list[Name], *columns: str) -> str:
        rows = [[f"`{name.name}`", *(str(getattr(name, column)) for column in columns)] for name in chosen]
        return _table(title, ["name", *columns], rows)

    served = [name for name in NAMES if name.status == "served"]
    sections = [
        _INTRODUCTION,
        names("Tensors only", [name for name in served if not name.parameter], "tensor", "dialect", "meaning"),
        names(
            "Tensors, keys of `sampling_parameters`, request parameters",
            [name for name in served if name.parameter and not name.field],
            *("type", "default", "tensor", "dialect", "meaning"),
        ),
        names("Other names for them", [name for name in served if name.field], "tensor", "dialect", "meaning"),
        _table(
            "Outputs",
            ["name", "tensor", "meaning"],
            [[f"`{output.name}`", output.tensor, output.meaning] for output in OUTPUTS],
        ),
        "All but `text_output` come only if asked for, and then with every response.\n",
        names("Refused, when they ask for something", _having("refused"), "dialect", "meaning"),
        names("Ignored without a word", _having("ignored"), "dialect", "meaning"),
        _ERRORS,
    ]
    return "\n".join(sections)


def _having(status: str) -> list[Name]:
    return [name for name in NAMES if name.status == status]


def _table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return f"## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(document(), end="")
