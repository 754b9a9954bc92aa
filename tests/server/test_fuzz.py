"""Requests of all kinds to the real server: each is answered, and nothing is left of it.

`PAGED_BACKEND_FUZZ=10000` sends so many; fewer without.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.client import Client
from tests.server.requests import requests

_TOGETHER = 10
_BATCHES = max(1, int(os.environ.get("PAGED_BACKEND_FUZZ", "300")) // _TOGETHER)


def test_any_request_is_answered(client: Client) -> None:
    ended: Counter[str] = Counter()

    @settings(max_examples=_BATCHES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(requests(), min_size=_TOGETHER, max_size=_TOGETHER))
    def send(batch: list[tuple[dict[str, list[Any]], dict[str, Any]]]) -> None:
        streams = [
            client.stream(None, stream=None, inputs=inputs, parameters=parameters) for inputs, parameters in batch
        ]
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
