"""Every name of the protocol, sent to the real server by every way it may come, does there what it says."""

from __future__ import annotations

import json
from typing import Any

import pytest

from paged_backend.engine import Engine
from tests.server.answers import PROMPT, RETURNS, SERVED, expected, parsed
from tests.server.client import Client
from triton_server_model.protocol_table import NAMES, Name

BASE = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
RANDOM = BASE | {"temperature": 1, "seed": 1}
BEAMS = BASE | {"beam_width": 3, "n": 3, "stop_token_ids": list(range(3, 120))}
SAMPLING: dict[str, dict[str, Any]] = {
    "n": RANDOM | {"n": 3},
    "max_tokens": BASE | {"max_tokens": 3},
    "min_tokens": BASE | {"stop_token_ids": [12], "min_tokens": 5},
    "temperature": BASE | {"temperature": 0.1, "seed": 1},
    "top_k": RANDOM | {"top_k": 3},
    "top_p": RANDOM | {"top_p": 0.1},
    "min_p": RANDOM | {"min_p": 0.5},
    "presence_penalty": BASE | {"presence_penalty": 2},
    "frequency_penalty": BASE | {"frequency_penalty": 2},
    "repetition_penalty": BASE | {"repetition_penalty": 3},
    "logit_bias": BASE | {"logit_bias": {"70": 100.0}},
    "allowed_token_ids": BASE | {"allowed_token_ids": [71, 72]},
    "bad_words": BASE | {"bad_words": "*"},
    "structured_outputs": BASE | {"structured_outputs": {"regex": "[ab]{3}"}},
    "logprobs": BASE | {"logprobs": 2},
    "prompt_logprobs": BASE | {"prompt_logprobs": 2},
    "seed": RANDOM | {"seed": 5},
    "stop": BASE | {"stop": "vv"},
    "include_stop_str_in_output": BASE | {"stop": "vv", "include_stop_str_in_output": True},
    "stop_token_ids": BASE | {"stop_token_ids": [12]},
    "ignore_eos": BASE | {"logit_bias": {"2": 100.0}},
    "skip_special_tokens": BASE | {"logit_bias": {"1": 100.0}, "skip_special_tokens": False},
    "truncate_prompt_tokens": BASE | {"truncate_prompt_tokens": 3},
    "beam_width": BASE | {"beam_width": 3},
    "length_penalty": BEAMS | {"length_penalty": -2},
    "early_stopping": BEAMS | {"early_stopping": "never"},
}
"""A request for each field of `SamplingParams`, in which that field makes a difference."""


def as_json(client: Client, params: dict[str, Any]) -> dict[str, Any]:
    return parsed(client.ask(PROMPT, sampling=params, inputs=RETURNS))


def as_strings(client: Client, params: dict[str, Any]) -> dict[str, Any]:
    """gRPC request parameters."""
    strings = {name: value if isinstance(value, str) else json.dumps(value) for name, value in params.items()}
    return parsed(client.ask(PROMPT, parameters=strings | dict.fromkeys(RETURNS, "true")))


def over_http(client: Client, params: dict[str, Any]) -> dict[str, Any]:
    """Scalars, but for lists that are tensors."""
    scalars = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in params.items()}
    body = {"text_input": PROMPT, "exclude_input_in_output": True, "parameters": scalars, **RETURNS}
    answer = client.generate(body)
    assert answer.status_code == 200, answer.text
    outputs = {name: value for name, value in answer.json().items() if name not in ("model_name", "model_version")}
    return parsed({name: value if isinstance(value, list) else [value] for name, value in outputs.items()})


def as_tensors(client: Client, params: dict[str, Any]) -> dict[str, Any]:
    tensors = {name: value for name, value in params.items() if SERVED[name].tensor}
    rest = {name: value for name, value in params.items() if name not in tensors}
    assert tensors
    return parsed(client.ask(PROMPT, sampling=rest, inputs=RETURNS | tensors))


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_field(client: Client, engine: Engine, name: str) -> None:
    params = SAMPLING[name]
    answer = expected(engine, params)
    assert answer != expected(engine, {other: value for other, value in params.items() if other != name})
    for ask in (as_json, as_strings, over_http):
        assert ask(client, params) == answer
    if SERVED[name].tensor:
        assert as_tensors(client, params) == answer


ALIASES = [name for name in SERVED.values() if name.field]


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.name)
def test_alias(client: Client, engine: Engine, alias: Name) -> None:
    params = dict(SAMPLING[alias.field])
    answer = expected(engine, params)
    params[alias.name] = params.pop(alias.field)
    for ask in (as_json, as_strings, over_http, *([as_tensors] if alias.tensor else [])):
        assert ask(client, params) == answer
    both = client.stream(PROMPT, sampling=params | {alias.field: params[alias.name]})
    both.finish()
    assert f"{alias.field}={params[alias.name]!r}: not together with {alias.name}" in both.error


@pytest.mark.parametrize("name", [name for name in NAMES if name.status == "refused"], ids=lambda name: name.name)
def test_refused(client: Client, engine: Engine, name: Name) -> None:
    asks = 2 if name.asks(2) else False
    message = f"{name.name}={asks!r}: not supported by this model"
    if name.tensor:
        assert f"{name.name}=" in (error := client.refusal(PROMPT, inputs={name.name: "x"}))
        assert "not supported by this model" in error
        assert client.ask(PROMPT, inputs={name.name: ""})["text_output"]
        return
    nothing = max(name.nothing - {"none"})
    for way in ("sampling", "parameters"):
        assert message in client.refusal(PROMPT, **{way: {name.name: asks}})
        assert client.ask(PROMPT, **{way: {name.name: nothing}})["text_output"]


def test_ignored_without_a_word(client: Client) -> None:
    names = [name.name.replace("*", "any") for name in NAMES if name.status == "ignored"]
    for body in (
        {"parameters": dict.fromkeys(names, "1")},
        {"sampling_parameters": json.dumps(dict.fromkeys(names, 1))},
    ):
        assert client.generate({"text_input": PROMPT} | body).json()["text_output"].startswith(PROMPT)
    client.settle()
    assert [client.metric("unknown_parameters_total", name=name) for name in names] == [None] * len(names)


def test_unknown_parameters_are_counted(client: Client) -> None:
    client.settle()
    before = client.metric("unknown_parameters_total", name="tempreature") or 0
    client.ask(PROMPT, sampling=r'{"\ud800": 1, "max_tokens": 1}')  # no name for a metric
    for _ in range(3):
        client.ask(PROMPT, parameters={"tempreature": 1, "max_tokens": 1})
        client.ask(PROMPT, sampling={"tempreature": 1, "max_tokens": 1})
    client.settle()
    assert client.metric("unknown_parameters_total", name="tempreature") == before + 6
