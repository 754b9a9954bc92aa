"""Structured outputs over the wire, in the dialect of Triton's vLLM backend."""

from __future__ import annotations

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor

from transformers import PreTrainedTokenizerFast

from tests.server.client import Client
from tests.text import schemas
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


def test_200_schemas(client: Client, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    closing = {str(token): 4.0 for token in byte_tokenizer('"}]').input_ids}
    wanted = [schemas.schema(random.Random(seed)) for seed in range(200)]

    def ask(number: int) -> str | None:
        """The text, if the model has ended it."""
        sampling = {"structured_outputs": {"json": wanted[number]}, "max_tokens": 120, "seed": number}
        inputs = {"return_finish_reason": True}
        answer = client.ask(f"number {number}", sampling=sampling | {"logit_bias": closing}, inputs=inputs)
        assert answer["finish_reason"][0] in ("stop", "length")
        return answer["text_output"][0] if answer["finish_reason"] == ["stop"] else None

    with ThreadPoolExecutor(16) as threads:
        texts = list(threads.map(ask, range(200)))
    assert len(texts) - texts.count(None) > 120
    for text, schema in zip(texts, wanted, strict=True):
        if text is not None:
            schemas.check(text, schema)
