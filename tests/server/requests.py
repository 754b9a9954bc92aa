"""Requests of all kinds, good and bad."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

from triton_server_model.protocol_table import NAMES

TENSORS = {name.name: name.tensor.split() for name in NAMES if name.tensor}
"""Type and size of those of paged_llm, by name."""
_KNOWN = {name.name for name in NAMES}
_RESERVED = ("priority", "timeout", "sequence_id", "sequence_start", "sequence_end", "headers", "binary_data_output")
"""Request parameters that gRPC clients refuse."""
_SPOKEN = [name.name for name in NAMES if name.parameter]
_TYPICAL = ["", "0", "1", "2", "0.5", "false", "true", "none", "never", "[1, 2]", '{"5": 1}', "[", "a", "json", "regex"]

_texts = st.sampled_from(_TYPICAL) | st.text(max_size=20)
_scalars = st.booleans() | st.integers(-3, 40) | st.integers(-(2**63), 2**63) | st.floats() | _texts
_values = st.recursive(
    st.none() | _scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4)
)
_names = st.sampled_from(_SPOKEN) | st.text(max_size=20).map("?{}".format)  # too odd to be counted by name
_sampling = st.dictionaries(_names, _values, max_size=5).map(lambda fields: json.dumps(fields).encode()) | st.binary()
_chats = st.lists(st.dictionaries(st.sampled_from(["role", "content"]), _texts), max_size=3)
_strings = _texts.map(lambda text: text.encode(errors="replace")) | st.binary(max_size=20)


def _elements(name: str, kind: str, size: str) -> st.SearchStrategy[list[Any]]:
    one = {
        "BOOL": st.booleans(),
        "INT32": st.integers(-3, 300),
        "UINT64": st.integers(0, 3),
        "FP32": st.floats(-0.5, 2, width=32) | st.just(float("nan")),
        "STRING": _strings,
    }[kind]
    if name == "sampling_parameters":
        one = _sampling
    if name in ("messages", "tools"):
        one = _chats.map(lambda chat: json.dumps(chat).encode()) | _strings
    return st.lists(one, max_size=5) if size == "[-1]" else st.lists(one, min_size=1, max_size=1)


def requests(
    tensors: Mapping[str, list[str]] = TENSORS,
) -> st.SearchStrategy[tuple[dict[str, list[Any]], dict[str, Any]]]:
    """Some of `tensors`, as lists of elements by name, and request parameters, all of which gRPC can send."""
    elements = {name: _elements(name, *tensor) for name, tensor in tensors.items()}
    text = elements.pop("text_input")
    inputs = st.fixed_dictionaries({"text_input": st.just([b"the fox"]) | text}, optional=elements)
    few = st.tuples(inputs, st.sets(st.sampled_from(list(tensors)), max_size=4)).map(
        lambda pair: {
            name: value for name, value in pair[0].items() if value and (name == "text_input" or name in pair[1])
        }
    )
    return st.tuples(few, st.dictionaries(_names, _scalars, max_size=4).map(_sendable))


def _sendable(parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        name if name in _KNOWN else f"unknown{len(name) % 4}": value  # only so many are counted by name
        for name, value in parameters.items()
        if name not in _RESERVED and not name.startswith("triton_") and _encodes(value)
    }


def _encodes(value: Any) -> bool:
    """gRPC's strings are valid Unicode, and its integers have 64 bits."""
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return not isinstance(value, int) or -(2**63) <= value < 2**63
