"""Generated traces, and traces read from CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_backend.errors import InvalidArgument
from paged_backend.simulate.names import SHAREGPT_OUTPUT, SHAREGPT_PROMPT
from paged_backend.simulate.trace import Trace, burst, generate
from paged_backend.simulate.trace_csv import read_trace, write_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:05.4799600,110,27
2023-11-16 18:17:04.0799600,3180,8
"""
BURSTGPT = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,a,1.5,ChatGPT,472,18,490,Conversation log
45,b,2,ChatGPT,1087,0,1087,Conversation log
118.5,c,3,GPT-4,417,276,693,API log
"""
OURS = """arrival,prompt,output,tenant,prefix,prefix_tokens,priority
2.5,100,10,alice,system,64,0
1.5,50,20,bob,,,-3
2.0,80,30,alice,other,80,2
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


def test_lengths_are_those_of_sharegpt() -> None:
    trace = generate(100_000, 10)
    assert trace.prompt.mean() == pytest.approx(SHAREGPT_PROMPT, rel=0.02)
    assert trace.output.mean() == pytest.approx(SHAREGPT_OUTPUT, rel=0.02)
    assert trace.prompt.min() >= 1
    assert (trace.prompt + trace.output).max() <= 2048


@pytest.mark.parametrize("burstiness", [0.2, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    gaps = np.diff(generate(100_000, 25, burstiness=burstiness).arrival)
    assert gaps.mean() == pytest.approx(1 / 25, rel=0.03)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1 / burstiness, rel=0.05)
    assert not generate(10, float("inf")).arrival.any()


def test_tenants_and_prefixes() -> None:
    trace = generate(5000, 10, tenants=3, prefixes=4, prefix_tokens=100)
    assert set(trace.tenant.tolist()) == {0, 1, 2}
    counts = np.bincount(trace.prefix)
    assert counts[0] / counts[3] == pytest.approx(4, rel=0.2)
    assert trace.prompt.min() > 100


def test_one_trace_beside_another() -> None:
    both = Trace.of([0, 2.0], 5, 5, prefix=[0, -1], tenants=("a",)).and_also(burst(2, 9, 1, at=1.0))
    assert both.arrival.tolist() == [0, 1, 1, 2]
    assert both.prompt.tolist() == [5, 9, 9, 5]
    assert [both.tenants[tenant] for tenant in both.tenant] == ["a", "noisy", "noisy", "a"]
    assert both.prefix.tolist() == [0, -1, -1, -1]


def test_another_rate() -> None:
    trace = generate(1000, 10).at_rate(40)
    assert trace.rate == pytest.approx(40)
    assert len(trace.first(10)) == 10


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"num_requests": 0}, "requests"),
        ({"rate": 0}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"burstiness": -1}, "burstiness"),
        ({"mean_prompt": 1000}, "mean_prompt"),
        ({"mean_output": 0}, "mean_output"),
        ({"max_total": 1}, "max_total"),
        ({"tenants": 0}, "tenants"),
        ({"prefixes": 2}, "prefix_tokens"),
    ],
)
def test_a_generator_names_what_is_wrong(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        generate(**{"num_requests": 10, "rate": 1.0} | arguments)
    assert caught.value.field == field


def test_azure(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, AZURE))
    assert trace.arrival.tolist() == pytest.approx([0, 0.1, 1.5], abs=1e-6)
    assert trace.prompt.tolist() == [4808, 3180, 110]
    assert trace.output.tolist() == [10, 8, 27]


def test_burstgpt_without_its_failures(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, BURSTGPT))
    assert trace.arrival.tolist() == [0, 113.5]
    assert trace.prompt.tolist() == [472, 417]
    assert trace.output.tolist() == [18, 276]


def test_ours_and_back(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, OURS))
    assert trace.arrival.tolist() == [0, 0.5, 1.0]
    assert [trace.tenants[tenant] for tenant in trace.tenant] == ["bob", "alice", "alice"]
    assert trace.priority.tolist() == [-3, 2, 0]
    assert trace.prefix_tokens.tolist() == [0, 80, 64]
    assert trace.prefix[0] == -1
    assert trace.prefix[1] != trace.prefix[2]
    again = tmp_path / "again.csv"
    write_trace(trace, again)
    other = read_trace(again)
    for name in ("arrival", "prompt", "output", "prefix_tokens", "priority"):
        assert getattr(other, name).tolist() == getattr(trace, name).tolist()
    assert [other.tenants[tenant] for tenant in other.tenant] == ["bob", "alice", "alice"]
    assert ((other.prefix < 0) == (trace.prefix < 0)).all()


@pytest.mark.parametrize(
    ("text", "field", "says"),
    [
        ("a,b\n1,2\n", "trace", "header"),
        ("", "trace", "header"),
        ("arrival,prompt,output\n", "trace", "at least 1 request"),
        ("arrival,prompt,output,color\n1,1,1,red\n", "trace", "unknown column"),
        ("arrival,prompt,output\n0,1,1\n0,0,1\n", "prompt", "row 2 of the trace: must be a whole number, 1 to"),
        ("arrival,prompt,output\n0,1,1\n0,x,1\n", "prompt", "row 2"),
        ("arrival,prompt,output\n0,1,1.5\n", "output", "row 1"),
        ("arrival,prompt,output\nsoon,1,1\n", "arrival", "row 1 of the trace: must be a number of seconds"),
        ("arrival,prompt,output\nnan,1,1\n", "arrival", "seconds"),
        ("arrival,prompt,output\n0,1\n", "output", "row 1 of the trace: must have 3 columns"),
        ("arrival,prompt,output,prefix_tokens\n0,1,1,2\n", "prefix_tokens", "at most prompt=1"),
        ("arrival,prompt,output,priority\n0,1,1,5000\n", "priority", "-1000 to 1000"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", "TIMESTAMP", "row 1"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,-1,1\n", "ContextTokens", "row 1"),
        ("Timestamp,Model,Request tokens,Response tokens\n1,x,0,0\n", "trace", "at least 1 request"),
        ('arrival,prompt,output\n0,"1,1\n', "trace", "cannot be read as CSV"),
    ],
)
def test_a_bad_trace_is_told_by_field_row_and_range(tmp_path: Path, text: str, field: str, says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_trace(write(tmp_path, text))
    assert caught.value.field == field
    assert says in str(caught.value)


def test_a_missing_trace(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot be read"):
        read_trace(tmp_path / "none.csv")
