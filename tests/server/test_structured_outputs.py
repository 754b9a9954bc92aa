"""Structured outputs over the wire, in the dialect of Triton's vLLM backend."""

from __future__ import annotations

import json
import re

from tests.server.client import Client
from tests.text.test_grammar import SLOW

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}


def test_json_text_object_and_parameter(client: Client) -> None:
    fields = {"temperature": 0, "max_tokens": 60}
    for wanted in (json.dumps({"json": SCHEMA}), {"json": SCHEMA}, {"json": json.dumps(SCHEMA)}):
        stream = client.stream("as JSON:", sampling=fields | {"structured_outputs": wanted})
        assert json.loads(stream.finish())["a"] in ("x", "y")
    wanted = json.dumps({"regex": "[ab]{4}"})
    answer = client.generate({"text_input": "a", "parameters": fields | {"structured_outputs": wanted}})
    assert re.fullmatch("a[ab]{4}", answer.json()["text_output"])


def test_a_bad_schema_fails_alone(client: Client) -> None:
    bad = client.stream("a", sampling={"structured_outputs": {"json": {"type": "strin"}}})
    slow = client.stream("a", sampling={"structured_outputs": {"json": SLOW}})
    good = client.stream("a", sampling={"max_tokens": 3, "ignore_eos": True})
    assert good.finish()
    assert slow.error is None  # it is still being compiled
    bad.finish()
    slow.finish()
    assert bad.error is not None
    assert 'structured_outputs=\'{"type": "strin"}\': Invalid type: strin' in bad.error
    assert slow.error is not None
    assert re.search("takes more than (2 seconds|1024 MiB of memory) to compile", slow.error)
