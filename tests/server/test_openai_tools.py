"""Tool calls in the text of a model."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triton_server_model.openai.schemas import ChatRequest
from triton_server_model.openai.tools import parser

TOOLS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g")]
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>'
OTHER = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
F, G = ("f", {"x": "é"}), ("g", {})


def read(pieces: list[str], **request: Any) -> tuple[str, list[tuple[str, Any]]]:
    """Content and calls, put together as clients do."""
    asked = {"model": "m", "messages": [{"role": "user"}], "tools": TOOLS} | request
    reading = parser(ChatRequest(**asked))
    content, calls = "", list[dict[str, str]]()
    for number, piece in enumerate(pieces, 1):
        for delta in reading.feed(piece, end=number == len(pieces)):
            content += delta.get("content", "")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(calls)
                    calls.append({"name": call["function"]["name"], "arguments": ""})
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
    assert reading.calls == len(calls)
    return content, [(call["name"], json.loads(call["arguments"])) for call in calls]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("Hello. ", "Hello. ", []),
        (CALL, "", [F]),
        (f"Wait.\n{CALL}\n{OTHER}\n", "Wait.", [F, G]),
        (f"{CALL} and {OTHER} <tool", " and <tool", [F, G]),
        (CALL.removesuffix("</tool_call>"), "", [F]),
        ('<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
        ("<tool_call>no JSON</tool_call>" + CALL, "<tool_call>no JSON</tool_call>", [F]),
        (
            '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
            '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
            [],
        ),
        ("1 < 2 <tool_call", "1 < 2 <tool_call", []),
    ],
)
def test_tagged(text: str, content: str, calls: list[Any]) -> None:
    assert read([text]) == (content, calls)
    assert read(list(text)) == (content, calls)


PIECES = st.sampled_from(["a", " ", "\n", "<", CALL, OTHER, "<tool_call>", "</tool_call>", "{}"])


@given(st.lists(PIECES), st.data())
def test_how_text_is_cut_makes_no_difference(pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    whole = read([text])
    assert read([text[start:end] for start, end in itertools.pairwise(cuts)] + [""]) == whole


def test_content_comes_at_once() -> None:
    reading = parser(ChatRequest(model="m", messages=[{"role": "user"}], tools=TOOLS))
    assert list(reading.feed("I see <", end=False)) == [{"content": "I see"}]
    assert list(reading.feed("b>", end=False)) == [{"content": " <b>"}]


def test_one_call_at_most() -> None:
    assert read([CALL + OTHER], parallel_tool_calls=False) == ("", [F])


def test_no_calls_are_looked_for() -> None:
    assert read([CALL], tool_choice="none") == (CALL, [])
    assert read([CALL], tools=[]) == (CALL, [])


def test_named_and_required() -> None:
    named = {"type": "function", "function": {"name": "g"}}
    assert read(['{"x"', ": 1", "}", ""], tool_choice=named) == ("", [("g", {"x": 1})])
    listed = '[{"name": "f", "arguments": {"x": "é"}}, {"name": "g", "arguments": {}}]'
    assert read(list(listed), tool_choice="required") == ("", [F, G])
    assert read([listed[:-1]], tool_choice="required") == (listed[:-1], [])


def test_what_required_holds_the_text_to() -> None:
    point = {"type": "object", "properties": {"x": {"$ref": "#/$defs/number"}}, "$defs": {"number": {"type": "number"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": point}}]
    asked = {"model": "m", "messages": [{"role": "user"}], "tools": tools, "parallel_tool_calls": False}
    schema = ChatRequest(**asked, tool_choice="required").sampling_parameters()["structured_outputs"]["json"]
    assert (schema["type"], schema["minItems"], schema["maxItems"]) == ("array", 1, 1)
    assert schema["$defs"] == {"number": {"type": "number"}}
    (call,) = schema["items"]["anyOf"]
    assert call["properties"] == {"name": {"const": "f"}, "arguments": point}
    named = {"type": "function", "function": {"name": "f"}}
    assert ChatRequest(**asked, tool_choice=named).sampling_parameters()["structured_outputs"] == {"json": point}
    assert "structured_outputs" not in ChatRequest(**asked).sampling_parameters()
