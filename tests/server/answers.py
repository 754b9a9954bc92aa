"""What the model answers, and what it should: the engine's own answer in its form."""

from __future__ import annotations

import functools
import itertools
import json
import operator
from typing import Any
from unittest import mock

import pytest

from paged_backend.engine import Engine
from paged_backend.request import Logprob, SamplingParams
from triton_server_model.protocol_table import NAMES

PROMPT = "the fox"
SERVED = {name.name: name for name in NAMES if name.status == "served"}
RETURNS = {name: True for name in SERVED if name.startswith("return_")}
"""Asks for all outputs."""
COUNTS = ("num_input_tokens", "num_cached_tokens")
"""Outputs that are the same in every response."""


def expected(engine: Engine, params: dict[str, Any], prompt: Any = PROMPT) -> dict[str, Any]:
    """The engine's own answer, as output tensors; JSON parsed."""
    if "beam_width" not in params:
        params = {"logprobs": 0} | params  # needed by cumulative_logprob
    (output,) = engine.generate([prompt], SamplingParams(**params))
    samples = output.samples or (output,)
    outputs = {
        "text_output": [sample.text for sample in samples],
        "finish_reason": [sample.finish_reason for sample in samples],
        "cumulative_logprob": [pytest.approx(sample.cumulative_logprob, rel=1e-4) for sample in samples],
        "logprobs": [_objects(sample.logprobs) for sample in samples],
        "num_input_tokens": [output.num_prompt_tokens],
        "num_cached_tokens": [mock.ANY],  # as many as earlier requests have left
        "num_output_tokens": [len(sample.token_ids) for sample in samples],
        "output_token_ids": [token for sample in samples for token in sample.token_ids],
    }
    if "prompt_logprobs" in params:
        outputs["prompt_logprobs"] = [_objects(output.prompt_logprobs)]
    return outputs


def _objects(tokens: list[list[Logprob]] | None) -> list[dict[str, Any]] | None:
    return tokens and [
        {
            str(one.token_id): {
                "logprob": pytest.approx(one.logprob, rel=1e-4),
                "rank": one.rank,
                "decoded_token": one.text,
            }
            for one in likeliest
        }
        for likeliest in tokens
    ]


def parsed(outputs: dict[str, Any]) -> dict[str, Any]:
    for name in outputs.keys() & {"logprobs", "prompt_logprobs"}:
        outputs[name] = [json.loads(text) for text in outputs[name]]
    return outputs


def joined(responses: list[dict[str, Any]]) -> dict[str, Any]:
    """The responses of a stream as one."""
    for response in map(parsed, responses):
        rest = iter(response.pop("output_token_ids"))
        response["ids"] = [list(itertools.islice(rest, count)) for count in response["num_output_tokens"]]
        assert not list(rest)
    for before, after in itertools.pairwise(responses):
        for reason, then, new in zip(before["finish_reason"], after["finish_reason"], after["ids"], strict=True):
            assert reason == "None" or (then == reason and not new)
    last = {name: responses[-1][name] for name in ("finish_reason", "cumulative_logprob", *COUNTS)}
    added = {
        name: [functools.reduce(operator.add, parts) for parts in zip(*(each[name] for each in responses), strict=True)]
        for name in ("text_output", "logprobs", "num_output_tokens", "ids")
    }
    return last | {"output_token_ids": list(itertools.chain(*added.pop("ids")))} | added
