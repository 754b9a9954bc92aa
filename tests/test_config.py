"""Bad configuration and bad parameters: field, value and bound in one message."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest

from paged_backend import EngineConfig, InvalidArgument, SamplingParams


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 0}, "block_size=0: Input should be greater than or equal to 1"),
        ({"num_blocks": -1}, "num_blocks=-1: Input should be greater than or equal to 1"),
        ({"dtype": "int3"}, "dtype='int3': Input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5: Input should be less than or equal to 1"),
        (
            {"kv_cache_bytes": "4 parsecs"},
            "kv_cache_bytes='4 parsecs': must be a number of bytes, or one with a unit: K",
        ),
        (
            {"max_num_seqs": 64, "max_num_batched_tokens": 32},
            "max_num_batched_tokens=32: must be at least max_num_seqs=64",
        ),
        ({"blocksize": 4}, "blocksize=4: unknown field of EngineConfig; did you mean 'block_size'?"),
        ({"xyzzy": 4}, "xyzzy=4: unknown field of EngineConfig; the fields are ageing_seconds, "),
    ],
)
def test_a_bad_engine_field_is_named_with_its_bound(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        EngineConfig(**fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [("4GiB", 4 * 1024**3), ("512 MiB", 512 * 1024**2), ("2GB", 2 * 10**9), ("1.5K", 1500), (77, 77)],
)
def test_memory_sizes_have_units(text: object, number: int) -> None:
    assert EngineConfig(kv_cache_bytes=text).kv_cache_bytes == number  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0: Input should be greater than or equal to 1"),
        ({"temperature": -0.1}, "temperature=-0.1: Input should be greater than or equal to 0"),
        ({"temperature": math.nan}, "temperature=nan: Input should be a finite number"),
        ({"temperature": math.inf}, "temperature=inf: Input should be a finite number"),
        ({"temperature": "warm"}, "temperature='warm': Input should be a valid number"),
        ({"top_p": 0}, "top_p=0: Input should be greater than 0"),
        ({"top_p": 1.1}, "top_p=1.1: Input should be less than or equal to 1"),
        ({"top_k": -2}, "top_k=-2: Input should be greater than or equal to -1"),
        ({"top_k": 2**63}, "top_k=9223372036854775808: Input should be less than 2147483648"),
        ({"temperature": 1e300}, "temperature=1e+300: Input should be less than or equal to 10000"),
        ({"top_k": 1.5}, "top_k=1.5: Input should be a valid integer"),
        ({"min_p": -1}, "min_p=-1: Input should be greater than or equal to 0"),
        ({"seed": -1}, "seed=-1: Input should be greater than or equal to 0"),
        ({"stop": ""}, "stop.0='': String should have at least 1 character"),
        ({"stop": ["a"] * 65}, "Tuple should have at most 64 items"),
        ({"stop": 5}, "stop=5: Input should be a valid tuple"),
        ({"stop_token_ids": [1, -5]}, "stop_token_ids.1=-5: Input should be greater than or equal to 0"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens=9: must be at most max_tokens=3"),
        ({"temprature": 1}, "temprature=1: unknown field of SamplingParams; did you mean 'temperature'?"),
    ],
)
def test_a_bad_sampling_field_is_named_with_its_bound(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(**fields)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_strings_become_numbers_as_clients_send_them() -> None:
    params = SamplingParams(temperature="0.1", max_tokens="5", ignore_eos="false", stop="x")  # type: ignore[arg-type]
    assert (params.temperature, params.max_tokens, params.ignore_eos, params.stop) == (0.1, 5, False, ("x",))


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(temperature="x" * 10_000)  # type: ignore[arg-type]
    error = caught.value
    assert len(str(error)) < 400
    again = pickle.loads(pickle.dumps(InvalidArgument("named", error.value, error.allowed)))
    assert len(pickle.dumps(again)) < 800
    assert str(again) == str(error).replace("temperature", "named")
    assert str(error).startswith("temperature='xxx")
    assert "xxx... (10002 characters): Input should be a valid number" in str(error)


def test_optimize_for_sets_the_budgets_and_each_may_still_be_set() -> None:
    budgets = {name: EngineConfig(optimize_for=name) for name in ("throughput", "balanced", "latency")}
    assert [(one.step_tokens, one.prefill_tokens) for one in budgets.values()] == [
        (16384, 16384),
        (2048, 1024),
        (1024, 256),
    ]
    own = EngineConfig(optimize_for="latency", max_prefill_tokens=64, max_num_batched_tokens=512)
    assert (own.step_tokens, own.prefill_tokens) == (512, 64)
    assert EngineConfig(optimize_for="latency", max_num_seqs=3000).step_tokens == 3000
