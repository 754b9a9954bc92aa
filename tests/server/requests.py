"""Requests of all kinds, good and bad."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from triton_server_model.protocol_table import NAMES

_TENSORS = {name.name: name.tensor.split() for name in NAMES if name.tensor}
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


def _elements(name: str) -> st.SearchStrategy[list[Any]]:
    kind, size = _TENSORS[name]
    one = {"BOOL": st.booleans(), "INT32": st.integers(-3, 300), "STRING": _strings}[kind]
    if name == "sampling_parameters":
        one = _sampling
    if name in ("messages", "tools"):
        one = _chats.map(lambda chat: json.dumps(chat).encode()) | _strings
    return st.lists(one, max_size=5) if size == "[-1]" else st.lists(one, min_size=1, max_size=1)


def requests() -> st.SearchStrategy[tuple[dict[str, list[Any]], dict[str, Any]]]:
    """Tensors, as lists of elements by name, and request parameters."""
    inputs = st.fixed_dictionaries(
        {"text_input": st.just([b"the fox"]) | _elements("text_input")},
        optional={name: _elements(name) for name in _TENSORS if name != "text_input"},
    )
    few = st.tuples(inputs, st.sets(st.sampled_from(list(_TENSORS)), max_size=4)).map(
        lambda pair: {name: value for name, value in pair[0].items() if name == "text_input" or name in pair[1]}
    )
    return st.tuples(few, st.dictionaries(_names, _scalars, max_size=4))
