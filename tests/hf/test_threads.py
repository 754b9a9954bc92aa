"""Calls of generate() from several threads share the engine, and one that fails ends alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from hf_integration import stats, unpatch
from paged_backend.errors import EngineDead, InvalidArgument
from tests.tiny import Pair, build, prompts

STEPS = 40


def call(rows: int) -> dict[str, Any]:
    return prompts(*range(rows + 3, 2 * rows + 3)) | {"max_new_tokens": STEPS, "eos_token_id": None}


def test_threads_are_batched_together(make_patched: Any) -> None:
    plain, model = build(), make_patched(strict=True)
    calls = [call(rows) for rows in (1, 2, 1, 3, 1, 2, 1, 2)]
    want = [plain.generate(**arguments).tolist() for arguments in calls]
    together = threading.Barrier(len(calls))

    def run(arguments: dict[str, Any]) -> list[list[int]]:
        together.wait()
        return model.generate(**arguments).tolist()

    before = stats(model).engine
    with ThreadPoolExecutor(len(calls)) as pool:
        got = list(pool.map(run, calls))
    after = stats(model).engine
    assert got == want
    assert stats(model).served == len(calls)
    assert after.steps - before.steps < len(calls) * STEPS / 2, "one call after the other would take 8 times 40 steps"
    assert after.output_tokens - before.output_tokens == 13 * STEPS


def test_ordinary_forward_while_another_thread_generates(make_patched: Any) -> None:
    plain, model = build(), make_patched(strict=True)
    inputs = prompts(5, 9)
    with torch.no_grad():
        want = plain(**inputs).logits
        with ThreadPoolExecutor(1) as pool:
            generating = pool.submit(model.generate, **call(3) | {"max_new_tokens": 150})
            forwards = 0
            while not generating.done():
                assert torch.equal(model(**inputs).logits, want)
                forwards += 1
    assert forwards > 3, "the forwards must have run beside the engine"
    assert generating.result().tolist() == plain.generate(**call(3) | {"max_new_tokens": 150}).tolist()


class Broken(BaseStreamer):
    def __init__(self) -> None:
        self.puts = 0

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 4:
            raise ConnectionError("the reader went away")

    def end(self) -> None:
        pass


def test_an_exception_of_the_caller_ends_its_rows_alone(make_patched: Any) -> None:
    pair = Pair(build(), make_patched(strict=True))
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(pair.paged.generate, **call(2))
        with pytest.raises(ConnectionError):
            pair.paged.generate(**call(3) | {"max_new_tokens": 200}, streamer=Broken())
        assert beside.result().tolist() == pair.plain.generate(**call(2)).tolist()
    pair.check(**call(3))
    engine = stats(pair.paged).engine
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    assert engine.output_tokens < (2 + 3) * STEPS + 3 * 100, "the broken call's rows must not have run to their end"


def test_a_bad_row_is_refused(make_patched: Any) -> None:
    pair = Pair(build(), make_patched(strict=True))
    ids = prompts(5, 5)["input_ids"]
    ids[1, 2] = 128
    with pytest.raises(InvalidArgument, match="128"):
        pair.paged.generate(ids, max_new_tokens=4)
    pair.check(**call(2))


def test_a_failing_step_raises_in_every_caller(make_patched: Any) -> None:
    model = make_patched(strict=True, fuse=False)  # so that hooks are called
    together = threading.Barrier(3)
    calls = iter(range(100))

    def fail(*_: Any) -> None:
        if next(calls) == 10:
            raise MemoryError("no memory for this step")

    hook = model.lm_head.register_forward_hook(fail)

    def run(rows: int) -> None:
        together.wait()
        model.generate(**call(rows))

    with ThreadPoolExecutor(3) as pool:
        errors = [future.exception() for future in [pool.submit(run, rows) for rows in (1, 2, 3)]]
    hook.remove()
    assert all(isinstance(error, (MemoryError, EngineDead)) for error in errors), errors
    assert any("no memory for this step" in str(error) for error in errors)
    # The way back, whether or not the engine survived.
    unpatch(model)
    Pair(build(), make_patched(model, strict=True)).check(**call(2))


def test_unpatch_while_generating(make_patched: Any) -> None:
    model = make_patched(strict=True)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(model.generate, **call(2) | {"max_new_tokens": 200})
        while stats(model).engine.num_running == 0 and not running.done():
            pass
        unpatch(model)
        with pytest.raises(EngineDead):
            running.result(timeout=30)
    assert model.generate(**call(2)).tolist() == build().generate(**call(2)).tolist()
