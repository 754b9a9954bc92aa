"""The workloads are what other engines were measured with, to the last token."""

from __future__ import annotations

import pytest

from paged_backend import InvalidArgument
from paged_backend.bench.workloads import CPU_SET, NAMES, Workload, workload


@pytest.mark.parametrize(
    ("name", "requests", "prompt_tokens", "output_tokens", "last_token"),
    [
        ("offline256", 256, 141831, 140246, 28926),
        ("bs1", 1, 128, 256, 15342),
        ("bs32", 32, 16384, 4096, 16304),
        ("shared64", 64, 135168, 8192, 5203),
        ("long8", 8, 128000, 2048, 13222),
        ("prefill32", 32, 65536, 32, 25051),
        ("batch32", 32, 4863, 2654, 23609),
        ("cpu1", 1, 64, 64, 26900),
        ("shared16", 16, 8704, 512, 2246),
    ],
)
def test_workloads(name: str, requests: int, prompt_tokens: int, output_tokens: int, last_token: int) -> None:
    # The last token depends on every draw before it.
    made = workload(name)
    sizes = (len(made.requests), made.prompt_tokens, made.output_tokens, made.requests[-1][0][-1])
    assert sizes == (requests, prompt_tokens, output_tokens, last_token)


def test_names() -> None:
    assert [workload(name).name for name in NAMES] == list(NAMES)
    with pytest.raises(InvalidArgument, match="workload='batch33': must be one of offline256"):
        workload("batch33")


@pytest.mark.parametrize(("name", "length"), [("shared64", 2048), ("shared16", 512)])
def test_shared_prefixes(name: str, length: int) -> None:
    prompts = [prompt for prompt, _ in workload(name).requests]
    assert len({tuple(prompt[:length]) for prompt in prompts}) == 1
    assert len({tuple(prompt[length:]) for prompt in prompts}) == len(prompts)


def test_counted_tokens() -> None:
    decode = Workload("decode", [([1, 2, 3], 5), ([1], 1)])
    assert (decode.counts_prompts, decode.counted_tokens) == (False, 6)
    prefill = Workload("prefill", [([1, 2, 3], 1), ([1], 1)])
    assert (prefill.counts_prompts, prefill.counted_tokens) == (True, 4)


def test_units() -> None:
    assert workload("batch32").unit == "output tok/s"
    assert workload("prefill32").unit == "prompt tok/s"
    assert CPU_SET == ("batch32", "cpu1", "shared16")
