"""What structured outputs cost: compiling a schema, each token's mask, and steps of an engine."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from paged_backend.engine import Engine
from paged_backend.request import SamplingParams
from paged_backend.structured_outputs import StructuredOutputs
from paged_backend.text.grammar import Grammars
from paged_backend.text.guidance import LLGuidance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS = 200
_ENDLESS = {"type": "array", "items": {"type": "string"}, "minItems": 10_000}


@dataclass(frozen=True, slots=True)
class SchemaCost:
    """Of one schema; the tokens are any that it allows."""

    schema: str
    characters: int
    compile_ms: float
    """Median; of a schema that was not seen before."""
    recall_ms: float
    """Median; of one that was."""
    fill_median_us: float
    fill_mean_us: float
    fill_p99_us: float
    accept_median_us: float


def record(fields: int, depth: int) -> dict[str, Any]:
    """An object of text, numbers, a choice and a list, nested."""
    kinds: list[dict[str, Any]] = [
        {"type": "string", "maxLength": 40},
        {"type": "integer", "minimum": 0, "maximum": 1000},
        {"enum": ["red", "green", "blue"]},
        {"type": "string", "pattern": "^[a-z]+@[a-z]+[.]org$"},
        {"type": "array", "items": {"type": "number"}, "maxItems": 5},
    ]
    properties = {f"field_{number}": kinds[number % len(kinds)] for number in range(fields)}
    if depth:
        properties |= {f"part_{number}": record(fields, depth - 1) for number in range(3)}
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


SCHEMAS = {"small": record(4, 0), "medium": record(10, 2), "large": record(20, 3)}


def measure_schemas(tokenizer: PreTrainedTokenizerBase, vocab_size: int, repeat: int) -> list[SchemaCost]:
    """Compile each of `SCHEMAS` `repeat` times, and sample from it as often."""
    eos = frozenset([tokenizer.eos_token_id])
    grammars = Grammars(LLGuidance, tokenizer, vocab_size, eos)
    grammars.make(StructuredOutputs(json_object=True), eos)  # reads the tokenizer, starts the process for trials
    lengths = np.array([1 + len(tokenizer.decode([token])) for token in range(len(tokenizer))])
    costs = []
    for name, schema in SCHEMAS.items():
        compiles, recalls, fills, accepts = [], [], [], []
        for number in range(repeat):
            wanted = StructuredOutputs(json=schema | {"title": str(number)})
            began = time.perf_counter()
            grammars.make(wanted, eos)
            compiled = time.perf_counter()
            output = grammars.make(wanted, eos)
            compiles.append(compiled - began)
            recalls.append(time.perf_counter() - compiled)
            rng = np.random.default_rng(number)
            for _ in range(_TOKENS):
                row = np.zeros(-(-vocab_size // 32), dtype=np.int32)
                began = time.perf_counter()
                output.fill(row)
                fills.append(time.perf_counter() - began)
                allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
                weights = 1 / lengths[allowed] ** 2
                token = int(rng.choice(allowed, p=weights / weights.sum()))
                began = time.perf_counter()
                output.accept(token)
                accepts.append(time.perf_counter() - began)
                if output.is_over or token in eos:
                    break
        us = 1e6 * np.array(fills)
        fill_costs = float(np.median(us)), float(us.mean()), float(np.percentile(us, 99))
        costs.append(
            SchemaCost(
                name,
                len(json.dumps(schema)),
                1e3 * float(np.median(compiles)),
                1e3 * float(np.median(recalls)),
                *fill_costs,
                1e6 * float(np.median(accepts)),
            )
        )
    return costs


def measure_steps(engine: Engine, rows: int, tokens: int, repeat: int) -> tuple[float, float]:
    """Milliseconds a step of `rows` requests that generate `tokens` each, free and guided: the least of `repeat`."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeat):
        for guided in seconds:
            wanted = StructuredOutputs(json=_ENDLESS) if guided else None
            params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=1, structured_outputs=wanted)
            began = time.perf_counter()
            outputs = engine.generate([[token + 1] for token in range(rows)], params)
            seconds[guided].append(time.perf_counter() - began)
            assert all(output.num_output_tokens == tokens for output in outputs)
    return 1e3 * min(seconds[False]) / tokens, 1e3 * min(seconds[True]) / tokens
