"""What the two endpoints take: OpenAI's fields, and beside them every field of the engine's own `SamplingParams`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, Json, model_validator

from paged_backend.errors import InvalidArgument
from paged_backend.request import SamplingParams

_WITHOUT_EFFECT = (
    *("metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
)
"""Fields of OpenAI's own service that change no answer here; clients send them."""
_MOST_PROMPTS = 1024


class StreamOptions(BaseModel):
    """How a stream differs from a whole answer."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    """End with a chunk that has the usage and no choices."""
    include_obfuscation: bool = False
    """Without effect."""


class GenerationRequest(SamplingParams):
    """What both endpoints take. A field that is null counts as not given."""

    model: str = Field(min_length=1)
    """A model of the tritonserver."""
    user: str = ""
    """The request's tenant, for the scheduling policy "fair-share"."""
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    def __init__(self, /, **data: Any) -> None:
        super().__init__(**{k: v for k, v in data.items() if v is not None and k not in _WITHOUT_EFFECT})

    @model_validator(mode="after")
    def _has_meaning(self) -> Self:
        if "stream_options" in self.model_fields_set and not self.stream:
            raise InvalidArgument("stream_options", self.stream_options.model_dump(), "only allowed with stream=true")
        if self.prompt_logprobs is not None:
            raise InvalidArgument("prompt_logprobs", self.prompt_logprobs, "send a completion's echo and logprobs")
        return self

    def sampling_parameters(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that were given."""
        return self.model_dump(include=set(SamplingParams.model_fields), exclude_unset=True, by_alias=True)

    def inputs(self) -> dict[str, str | bool]:
        """The model's input tensors, but for the prompt."""
        sampling = self.sampling_parameters() | ({"tenant": self.user} if self.user else {})
        counts = not self.stream or self.stream_options.include_usage
        return {
            "stream": self.stream,
            "exclude_input_in_output": True,
            "sampling_parameters": json.dumps(sampling),
            "return_finish_reason": True,
            "return_logprobs": "logprobs" in sampling,
            "return_num_input_tokens": counts,
            "return_num_cached_tokens": counts,
            "return_num_output_tokens": counts,
        }


def _prompts(value: Any) -> Any:
    """A list of prompts, each a string or a list of token ids, from the four forms that OpenAI allows."""
    several = isinstance(value, list) and all(isinstance(prompt, str | list) for prompt in value)
    prompts = value if several else [value]
    for prompt in prompts:
        if not (isinstance(prompt, str) or (isinstance(prompt, list) and all(map(_is_token, prompt)))):
            raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")
    if not prompts or not all(prompts):
        raise ValueError("must not be empty")
    return prompts


def _is_token(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)] = Field(max_length=_MOST_PROMPTS)
    echo: bool = False
    """Begin each text, and its log-probabilities, with the prompt."""

    @model_validator(mode="after")
    def _can_be_echoed(self) -> Self:
        if self.echo and self.logprobs is None and not all(isinstance(prompt, str) for prompt in self.prompt):
            raise InvalidArgument("echo", True, "of token ids only with logprobs, from which their text is taken")
        return self

    def sampling_parameters(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that were given, or follow from others."""
        fields = super().sampling_parameters()
        return fields | ({"prompt_logprobs": self.logprobs} if self.echo and self.logprobs is not None else {})


def _text(content: object) -> object:
    """The text of a message; parts are lines."""
    if not isinstance(content, list):
        return "" if content is None else content
    for number, part in enumerate(content):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ValueError(f'part {number} must be {{"type": "text", "text": "..."}}; only text is served')
    return "\n".join(part["text"] for part in content)


def _role(role: object) -> object:
    return "system" if role == "developer" else role  # its newer name, which templates do not know


class Call(BaseModel):
    """Which function a tool call names."""

    name: str
    arguments: Json[dict[str, Any]]


class ToolCall(BaseModel):
    """A call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Call


class Message(BaseModel):
    """One turn of a chat. What else it has is for the chat template."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[Literal["system", "user", "assistant", "tool"], BeforeValidator(_role)]
    content: Annotated[str, BeforeValidator(_text)] = ""
    tool_calls: list[ToolCall] | None = None


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1)
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    """A JSON schema."""


class Tool(BaseModel):
    """One tool of a chat."""

    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    """The function of a `ToolChoice`."""

    name: str


class ToolChoice(BaseModel):
    """Whether, and which, tool is called: a word, or an object that names a function."""

    type: Literal["none", "auto", "required", "function"] = "auto"
    function: FunctionName | None = None

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: object) -> object:
        return value if isinstance(value, dict) else {"type": value}

    @model_validator(mode="after")
    def _named(self) -> Self:
        if (self.type == "function") != (self.function is not None):
            raise InvalidArgument("tool_choice", self.type, 'must be "none", "auto", "required" or name a function')
        return self


class JsonSchema(BaseModel):
    """The schema of a `ResponseFormat`."""

    name: str = ""
    json_schema: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """What the text of an answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidArgument("response_format", self.type, 'type "json_schema", and only that, needs json_schema')
        return self


class ChatRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int = Field(2**31 - 1, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    """As many as the context has room for, unless given."""
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    tools: list[Tool] = Field([])
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    response_format: ResponseFormat = ResponseFormat(type="text")
    chat_template_kwargs: dict[str, Any] = Field({})
    """Further variables of the chat template."""

    def __init__(self, /, **data: Any) -> None:
        if data.get("max_completion_tokens") is not None and data.get("max_tokens") is not None:
            raise InvalidArgument("max_tokens", data["max_tokens"], "not together with max_completion_tokens")
        super().__init__(**data)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidArgument("top_logprobs", self.top_logprobs, "only allowed with logprobs=true")
        names = [tool.function.name for tool in self.tools]
        choice = self.tool_choice
        if "tool_choice" in self.model_fields_set and not self.tools and choice.type != "none":
            raise InvalidArgument("tool_choice", choice.type, "only allowed with tools")
        if choice.function is not None and choice.function.name not in names:
            raise InvalidArgument("tool_choice", choice.function.name, f"must be one of the tools: {', '.join(names)}")
        if len(self.forms) > 1:
            first, second, *_ = self.forms
            raise InvalidArgument(second, getattr(self, second).type, f"not together with {first}")
        return self

    @property
    def forms(self) -> list[str]:
        """Fields that say what the text has to match; one at most."""
        given = {
            "structured_outputs": self.structured_outputs is not None,
            "response_format": self.response_format.type != "text",
            "tool_choice": self.tool_choice.type in ("required", "function"),
        }
        return [name for name, is_given in given.items() if is_given]

    def sampling_parameters(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that were given, or follow from others."""
        fields = super().sampling_parameters() | {"max_tokens": self.max_tokens}
        if fields.pop("logprobs", False):
            fields["logprobs"] = self.top_logprobs
        if structured := self._structured_outputs():
            fields["structured_outputs"] = structured
        return fields

    def _structured_outputs(self) -> dict[str, Any] | None:
        """What `tool_choice` or `response_format` hold the text to."""
        parameters = {tool.function.name: tool.function.parameters for tool in self.tools}
        if self.tool_choice.function is not None:
            return {"json": parameters[self.tool_choice.function.name]}
        if self.tool_choice.type == "required":
            return {"json": _calls_schema(parameters, most=None if self.parallel_tool_calls else 1)}
        if self.response_format.json_schema is not None:
            return {"json": self.response_format.json_schema.json_schema}
        return {"json_object": True} if self.response_format.type == "json_object" else None


def _calls_schema(parameters: dict[str, dict[str, Any]], most: int | None) -> dict[str, Any]:
    """JSON schema of a list of calls of the functions with these `parameters`."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": schema},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, schema in parameters.items()
    ]
    # References within the parameters go from the root of the schema.
    definitions = {name: each for schema in parameters.values() for name, each in schema.get("$defs", {}).items()}
    bounds = {"minItems": 1} if most is None else {"minItems": 1, "maxItems": most}
    return {"type": "array", **bounds, "items": {"anyOf": calls}, "$defs": definitions}
