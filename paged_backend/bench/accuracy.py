"""What number formats cost in accuracy: the log-probabilities of a fixed text, through the whole engine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paged_backend.config import EngineConfig
from paged_backend.engine import Engine
from paged_backend.request import SamplingParams

TEXT = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
FORMATS: tuple[tuple[str, str | None], ...] = (("float32", None), ("bfloat16", None), ("bfloat16", "int8"))
"""dtype and quantization; the first is what the others are compared with."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Of one format."""

    dtype: str
    quantization: str | None
    tokens: int
    """That were scored: all of the text but the first, as many as the context has room for."""
    mean_logprob: float
    """Natural logarithm, of the tokens of the text."""
    difference: float
    """Of `mean_logprob` to that of the first format."""
    mean_deviation: float
    """Of single log-probabilities from those of the first format, without sign."""
    same_likeliest: float
    """Share of places where the likeliest token is that of the first format."""


def measure(model: str, fields: Mapping[str, object]) -> list[Accuracy]:
    """Score the text in each of `FORMATS`. `model` is local; `fields` are others of `EngineConfig`."""
    found: list[Accuracy] = []
    first: list[tuple[float, int]] = []
    for dtype, quantization in FORMATS:
        config = EngineConfig(**{"model": model, "dtype": dtype, "quantization": quantization, **fields})
        places = _score(config)
        first = first or places
        pairs = list(zip(places, first, strict=True))
        mean = statistics.fmean(logprob for logprob, _ in places)
        found.append(
            Accuracy(
                dtype,
                quantization,
                len(places),
                mean,
                mean - statistics.fmean(logprob for logprob, _ in first),
                statistics.fmean(abs(ours[0] - theirs[0]) for ours, theirs in pairs),
                statistics.fmean(ours[1] == theirs[1] for ours, theirs in pairs),
            )
        )
    return found


def _score(config: EngineConfig) -> list[tuple[float, int]]:
    """Log-probability of each token of the text but the first, and the likeliest token in its place."""
    engine = Engine(config)
    try:
        assert engine.tokenizer is not None
        ids = engine.tokenizer(TEXT)["input_ids"][: engine.max_model_len - 1]
        (output,) = engine.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=1))
    finally:
        engine.close()
    if output.error is not None:
        raise output.error
    assert output.prompt_logprobs is not None
    return [(own.logprob, likeliest.token_id) for own, likeliest in output.prompt_logprobs[1:]]
