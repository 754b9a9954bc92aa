"""Requests of all kinds to the real server: each is answered, and nothing is left of it.

`PAGED_BACKEND_FUZZ=10000` sends so many; fewer without.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.client import Client, Stream
from tests.server.requests import requests
from triton_server_model.protocol_table import NAMES

_TOGETHER = 10
_BATCHES = max(1, int(os.environ.get("PAGED_BACKEND_FUZZ", "300")) // _TOGETHER)
_RESERVED = ("priority", "timeout", "sequence_id", "sequence_start", "sequence_end", "headers", "binary_data_output")
"""Request parameters that gRPC clients refuse."""

_KNOWN = {name.name for name in NAMES}


def test_any_request_is_answered(client: Client) -> None:
    ended: Counter[str] = Counter()

    @settings(max_examples=_BATCHES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(requests(), min_size=_TOGETHER, max_size=_TOGETHER))
    def send(batch: list[tuple[dict[str, list[Any]], dict[str, Any]]]) -> None:
        streams = [_start(client, inputs, parameters) for inputs, parameters in batch]
        for stream in streams:
            stream.finish()
            ended["answered" if stream.error is None else "refused"] += 1
            assert stream.error is None or stream.error.startswith("Error generating stream: ")

    send()
    assert min(ended["answered"], ended["refused"]) > sum(ended.values()) / 20, ended
    answer = client.ask(
        "the fox", sampling={"max_tokens": 4, "ignore_eos": True}, inputs={"return_num_output_tokens": True}
    )
    assert answer["num_output_tokens"] == [4]
    client.await_metric("kv_blocks_used", 0)
    client.await_metric("requests_running", 0)


def _start(client: Client, inputs: dict[str, list[Any]], parameters: dict[str, Any]) -> Stream:
    allowed = {
        name if name in _KNOWN else f"unknown{len(name) % 4}": value  # only so many are counted by name
        for name, value in parameters.items()
        if name not in _RESERVED and not name.startswith("triton_") and _encodes(value)
    }
    tensors = {name: elements for name, elements in inputs.items() if elements}
    return client.stream(None, stream=None, inputs=tensors, parameters=allowed)


def _encodes(value: Any) -> bool:
    """gRPC's strings are valid Unicode, and its integers have 64 bits."""
    if isinstance(value, str):
        return not any("\ud800" <= character <= "\udfff" for character in value)
    return not isinstance(value, int) or -(2**63) <= value < 2**63
