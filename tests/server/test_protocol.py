"""Reading requests, without a server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_backend.errors import DeadlineExceeded, EngineDead, InvalidArgument, Overloaded
from paged_backend.request import SamplingParams
from triton_server_model.protocol import Cancelled, Generation, error_code, parse_request


def test_defaults() -> None:
    assert parse_request({"text_input": b"hi"}, {}) == Generation("hi", SamplingParams(), False, True)
    assert parse_request({"text_input": b"hi", "stream": True}, {}) == Generation("hi", SamplingParams(), True, False)


def test_sampling_parameters_override_request_parameters() -> None:
    inputs = {"text_input": b"hi", "sampling_parameters": b'{"max_tokens": 5, "stop": ["x"]}'}
    parameters = {"max_tokens": 9, "temperature": "0.1", "ignore_eos": "false", "id": "7", "accumulate_tokens": True}
    expected = SamplingParams(max_tokens=5, stop=("x",), temperature=0.1, ignore_eos=False)
    assert parse_request(inputs, parameters).params == expected


@pytest.mark.parametrize("field", ["n", "beam_width"])
def test_one_text_a_request(field: str) -> None:
    with pytest.raises(InvalidArgument, match=f"{field}=2: must be 1"):
        parse_request({"text_input": b"hi"}, {field: 2})


@given(text=st.binary(), sampling=st.binary(), parameters=st.dictionaries(st.text(), st.booleans() | st.text()))
def test_bad_bytes_only_raise_value_errors(text: bytes, sampling: bytes, parameters: dict) -> None:
    with pytest.raises(ValueError, match=r"sampling_parameters|text_input|field|Input"):
        parse_request({"text_input": text, "sampling_parameters": b"[" + sampling}, parameters)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidArgument("top_p", 2, "at most 1"), "INVALID_ARG"),
        (Overloaded("full"), "UNAVAILABLE"),
        (EngineDead("dead"), "UNAVAILABLE"),
        (DeadlineExceeded("timeout=1: too late"), "UNAVAILABLE"),
        (Cancelled(), "CANCELLED"),
        (ZeroDivisionError(), "INTERNAL"),
    ],
)
def test_error_codes(error: Exception, code: str) -> None:
    assert error_code(error) == code
