"""What the output of a request has to match."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from paged_backend.errors import CheckedModel, InvalidArgument

Kind = Literal["json", "regex", "grammar"]

LONGEST = 2**17
"""Characters of a schema, an expression, a grammar or all choices together."""
_VLLM_ONLY = (
    *("disable_fallback", "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"),
    *("structural_tag", "backend", "backend_was_auto", "_backend", "_backend_was_auto"),
)
"""Further fields of vLLM's `StructuredOutputsParams` and `GuidedDecodingParams`, sent with all others as nulls."""
_NAMES = ("json", "json_object", "regex", "choice", "grammar")


def _schema(value: object) -> object:
    """The JSON text of a schema."""
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        text = json.dumps(schema)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"must be a JSON schema: {error}") from None
    if not isinstance(schema, dict):
        raise ValueError("must be a JSON schema: an object, or its JSON text")
    return text


class StructuredOutputs(CheckedModel):
    """What an output has to match: exactly one of these. Names follow vLLM's."""

    json_schema: Annotated[str | None, BeforeValidator(_schema)] = Field(None, alias="json", max_length=LONGEST)
    """Written `json`: a JSON schema, as a dict or as JSON text. Kept as text."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = Field(None, max_length=LONGEST)
    """All of the output matches it; syntax of Rust's `regex`, without look-around and back-references."""
    choice: tuple[str, ...] | None = Field(None, min_length=1)
    """The output is one of these."""
    grammar: str | None = Field(None, max_length=LONGEST)
    """A context-free grammar: Lark as llguidance extends it (`start: ...`), or GBNF (`root ::= ...`)."""

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        values = (self.json_schema, self.json_object or None, self.regex, self.choice, self.grammar)
        given = [name for name, value in zip(_NAMES, values, strict=True) if value is not None]
        if len(given) != 1:
            raise InvalidArgument("structured_outputs", given, f"must have exactly one of {', '.join(_NAMES)}")
        if (length := len(self.source[1])) > LONGEST:
            raise InvalidArgument(given[0], f"{length} characters", f"must have at most {LONGEST} in all")
        return self

    @property
    def source(self) -> tuple[Kind, str]:
        """What a grammar backend compiles: a JSON schema, an expression or a grammar."""
        if self.regex is not None:
            return "regex", self.regex
        if self.choice is not None:
            return "regex", "|".join(map(re.escape, self.choice))
        if self.grammar is not None:
            return "grammar", self.grammar
        return "json", self.json_schema or '{"type": "object"}'


def parse(value: Any) -> Any:
    """Also takes a dict, or the JSON text of one, as Triton's wire carries it; of vLLM's classes, too."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidArgument("structured_outputs", value, f"must be JSON: {error}") from None
    if not isinstance(value, dict):
        return value
    for name in _VLLM_ONLY:
        if value.get(name):
            raise InvalidArgument(f"structured_outputs.{name}", value[name], "not supported by this engine")
    try:
        return StructuredOutputs(**{k: v for k, v in value.items() if v is not None and k not in _VLLM_ONLY})
    except InvalidArgument as error:
        field = error.field if error.field == "structured_outputs" else f"structured_outputs.{error.field}"
        raise InvalidArgument(field, error.value, error.allowed) from None
