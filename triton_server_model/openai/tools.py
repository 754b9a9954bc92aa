"""Finds tool calls in the text of the model."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any, Protocol

from triton_server_model.openai.schemas import ChatRequest

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
Delta = dict[str, Any]
"""What a chunk adds to a message."""


class Parser(Protocol):
    """Turns the text of one choice, as it comes, into deltas."""

    calls: int
    """Tool calls found so far."""

    def feed(self, text: str, *, end: bool) -> Iterator[Delta]:
        """The deltas that are certain with `text`; with `end`, all that is left."""
        ...


def parser(request: ChatRequest) -> Parser:
    """Of one choice."""
    if not request.tools or request.tool_choice.type == "none":
        return PlainText()
    if request.tool_choice.function is not None:
        return NamedCall(request.tool_choice.function.name)
    if request.tool_choice.type == "required":
        return ListedCalls()
    return TaggedCalls(parallel=request.parallel_tool_calls)


class PlainText:
    """No tools: all text is content."""

    calls = 0

    def feed(self, text: str, *, end: bool) -> Iterator[Delta]:
        """See `Parser`."""
        if text:
            yield {"content": text}


class TaggedCalls:
    """Calls as Hermes and Qwen models write them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

    Each is sent when it is whole. What stands between the tags but is no call is content; space around them is not.
    """

    def __init__(self, *, parallel: bool) -> None:
        self.calls = 0
        self._parallel, self._held = parallel, ""

    def feed(self, text: str, *, end: bool) -> Iterator[Delta]:
        """See `Parser`."""
        self._held += text
        while (start := self._held.find(_OPEN)) >= 0:
            yield from self._content(self._held[:start].rstrip())
            body, closed, rest = self._held[start + len(_OPEN) :].partition(_CLOSE)
            if not closed and not end:
                self._held = self._held[start:]
                return
            self._held = rest
            call = _loads(body)
            if not _is_call(call):
                yield from self._content(_OPEN + body + closed)
            elif self._parallel or self.calls == 0:
                yield _call(self.calls, call)
                self.calls += 1
        sure = self._held if end else self._held[: -_tag_begun(self._held) or None]
        sure = sure if end and not self.calls else sure.rstrip()
        self._held = self._held[len(sure) :]
        yield from self._content(sure)

    def _content(self, text: str) -> Iterator[Delta]:
        if text:
            yield {"content": text}


class NamedCall:
    """All text is the arguments of one function."""

    def __init__(self, name: str) -> None:
        self.calls = 0
        self._name = name

    def feed(self, text: str, *, end: bool) -> Iterator[Delta]:
        """See `Parser`."""
        if not text:
            return
        if self.calls:
            yield {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}
        else:
            self.calls = 1
            yield _call(0, {"name": self._name, "arguments": text})


class ListedCalls:
    """All text is one JSON list of calls, sent when it is whole. A list that was cut off is content."""

    def __init__(self) -> None:
        self.calls = 0
        self._held = ""

    def feed(self, text: str, *, end: bool) -> Iterator[Delta]:
        """See `Parser`."""
        self._held += text
        if not end:
            return
        calls = _loads(self._held)
        if isinstance(calls, list) and all(map(_is_call, calls)):
            for self.calls, call in enumerate(calls, 1):
                yield _call(self.calls - 1, call)
        else:
            yield {"content": self._held}


def _tag_begun(text: str) -> int:
    """How many characters at the end of `text` may be the start of a tag."""
    return next((size for size in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:size])), 0)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_call(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("arguments"), dict)


def _call(index: int, call: dict[str, Any]) -> Delta:
    arguments = call["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": call["name"], "arguments": text}
    return {
        "tool_calls": [{"index": index, "id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}]
    }
