"""Random JSON schemas, and texts that a random sampler makes of them."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema

LEAVES: tuple[dict[str, Any], ...] = (
    *({"type": kind} for kind in ("string", "integer", "number", "boolean", "null")),
    {"enum": ["a", 'q"x', "é", 1, 2.5, True, None]},
    {"const": {"a": [1, "x"]}},
    {"type": "string", "pattern": r"^\d{3}-\d{4}$"},
    {"type": "string", "pattern": "^(foo|bar)+$"},
    {"type": "string", "format": "date"},
    {"type": "string", "minLength": 2, "maxLength": 6},
    {"type": "integer", "minimum": -7, "maximum": 1200},
    {"type": "number", "exclusiveMinimum": -3, "maximum": 10},
    {"type": "integer", "multipleOf": 7},
    {"type": ["string", "null"]},
)
LIST = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
"""Refers to itself."""


def schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    kind = rng.choice(["leaf", *["object", "object", "array", "anyOf", "allOf"] * (depth > 0)])
    match kind:
        case "object":
            names = rng.sample(["id", "name", "größe", "x y", "value", 'qu"ote'], rng.randint(0, 4))
            made = {
                "type": "object",
                "properties": {name: schema(rng, depth - 1) for name in names},
                "required": [name for name in names if rng.random() < 0.7],
            }
            return made | rng.choice([{}, {"additionalProperties": False}, {"additionalProperties": {"type": "null"}}])
        case "array":
            least = rng.randint(0, 2)
            return {"type": "array", "items": schema(rng, depth - 1), "minItems": least, "maxItems": least + 2}
        case "anyOf":
            return {"anyOf": [schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
        case "allOf":
            parts = [{"type": "object", "properties": {name: schema(rng, 0)}, "required": [name]} for name in "ab"]
            return {"allOf": parts}
    return rng.choice(LEAVES)


def check(text: str, schema: dict[str, Any]) -> None:
    """The text is JSON, and valid."""
    jsonschema.validate(json.loads(text), schema)
