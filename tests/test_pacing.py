from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_backend import pacing
from paged_backend.pacing import Pace
from paged_backend.request import RequestOutput


def output(name: str, token: int, *, finished: bool = False) -> RequestOutput:
    return RequestOutput(name, "", [token], 1, token + 1, "length" if finished else None, finished=finished)


def paced(share: float, cores: int = 2) -> Pace:
    with mock.patch.object(pacing.os, "sched_getaffinity", return_value=set(range(cores))):
        return Pace(share)


@given(st.data())
def test_everything_comes_in_order_and_in_time(data: st.DataObject) -> None:
    """Requests begin and end in any steps, which take any time."""
    pace, now, number = paced(data.draw(st.sampled_from([0.05, 0.0001]))), 100.0, 0
    live: dict[str, int] = {}
    made, came = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    waits_since: dict[str, tuple[float, int]] = {}
    for number_of_step in range(data.draw(st.integers(1, 40))):
        now += data.draw(st.sampled_from([0.001, 0.02, 0.6]))
        if data.draw(st.booleans()):
            live[f"request {number}"] = 0
            number += 1
        step = []
        for name in list(live):
            finished = data.draw(st.integers(0, 4)) == 0
            step.append(output(name, live[name], finished=finished))
            made[name].append(live[name])
            live[name] += 1
            waits_since.setdefault(name, (now, number_of_step))
            if finished:
                del live[name]
        with mock.patch.object(pacing.time, "monotonic", return_value=now):
            sent = pace.next(step)
        for one in sent:
            came[one.request_id] += one.token_ids
        for name in list(waits_since):
            if came[name] == made[name]:
                del waits_since[name]
        for one in step:
            if one.finished or one.num_output_tokens == 1:
                assert came[one.request_id] == made[one.request_id]
        assert all(came[name] == made[name][: len(came[name])] for name in made)
        assert all(now - since < 1 or number_of_step - step < 16 for since, step in waits_since.values())


def test_the_more_wait_the_longer() -> None:
    def pause(streams: int, share: float, cores: int, of_step: int = 1) -> float:
        pace, came = paced(share, cores), []
        for step in range(0, max(3000, 60 * of_step), of_step):
            with mock.patch.object(pacing.time, "monotonic", return_value=100 + step / 1000):
                sent = pace.next([output(str(stream), step) for stream in range(streams)])
            if len(sent) > streams:  # neither the first nor single tokens
                came.append(step)
        return statistics.median(later - earlier for earlier, later in itertools.pairwise(came))

    for milliseconds, arguments in {
        17: (1, 0.05, 2),
        122: (16, 0.05, 2),
        31: (16, 0.05, 8),
        61: (16, 0.1, 2),
        1000: (256, 0.05, 2),
        3200: (256, 0.02, 2, 200),  # 16 steps
        5000: (256, 0.02, 2, 500),
    }.items():
        assert pause(*arguments) == pytest.approx(milliseconds, abs=1)


def test_nothing_waits_if_responses_may_take_all() -> None:
    pace = paced(1)
    assert [pace.next([output("a", token)]) for token in range(9)] == [[output("a", token)] for token in range(9)]
