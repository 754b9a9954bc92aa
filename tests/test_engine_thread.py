"""Concurrent callers: threads and asyncio tasks, batched together by one engine thread."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from paged_backend import (
    AsyncEngine,
    Engine,
    EngineConfig,
    EngineDead,
    EngineThread,
    InvalidArgument,
    Overloaded,
    RequestOutput,
    SamplingParams,
    SharedEngine,
)
from paged_backend.plugins import hookimpl
from paged_backend.stats import StepStats

CONFIG = {"num_blocks": 256, "max_num_seqs": 16, "max_num_batched_tokens": 128}


class Rows:
    """The largest batch seen."""

    most = 0

    @hookimpl
    def paged_step_ended(self, stats: StepStats) -> None:
        self.most = max(self.most, stats.num_rows)


@pytest.fixture
def rows() -> Rows:
    return Rows()


@pytest.fixture
def thread(tiny_llama_dir: Path, rows: Rows) -> Iterator[EngineThread]:
    with EngineThread(lambda: Engine(EngineConfig(model=str(tiny_llama_dir), **CONFIG), plugins=[rows])) as thread:
        yield thread


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0, ignore_eos=True, **fields)


def test_threads_are_batched_together_and_each_gets_its_own(thread: EngineThread, rows: Rows) -> None:
    prompts = [f"prompt {i} " * (i + 1) for i in range(12)]
    alone = [thread.generate([prompt], greedy(max_tokens=60))[0].token_ids for prompt in prompts]
    assert rows.most == 1
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda prompt: thread.generate([prompt], greedy(max_tokens=60))[0], prompts))
    assert [output.token_ids for output in together] == alone
    assert rows.most > 4


def test_streams_interleave(thread: EngineThread) -> None:
    streams = [thread.stream(prompt, greedy(max_tokens=10)) for prompt in ("a", "b")]
    outputs = [[next(stream) for stream in streams] for _ in range(10)]
    assert [pair[0].finished for pair in outputs] == [False] * 9 + [True]


def test_bad_input_raises_where_it_was_given(thread: EngineThread) -> None:
    with pytest.raises(InvalidArgument, match="prompt=''"):
        thread.generate(["fine", ""], greedy())
    assert thread.generate(["fine"], greedy(max_tokens=2))[0].finish_reason == "length"
    with pytest.raises(InvalidArgument, match="prompts='a text': must be a list"):
        thread.generate("a text", greedy())
    wait_idle(thread)


def wait_idle(thread: EngineThread) -> None:
    deadline = time.monotonic() + 10
    while thread.stats().num_running or thread.stats().num_waiting or thread.stats().blocks_used:
        assert time.monotonic() < deadline, thread.stats()
        time.sleep(0.01)


def test_abort_ends_a_running_request(thread: EngineThread) -> None:
    outputs: queue.SimpleQueue[RequestOutput] = queue.SimpleQueue()
    request_id = thread.submit("hello", greedy(max_tokens=400), on_output=outputs.put)
    outputs.get(timeout=10)
    thread.abort(request_id)
    thread.abort("unknown")
    last = outputs.get(timeout=10)
    while not last.finished:
        last = outputs.get(timeout=10)
    assert last.finish_reason == "abort"
    assert last.num_output_tokens < 400
    wait_idle(thread)


def test_leaving_a_stream_frees_its_blocks(thread: EngineThread) -> None:
    stream = thread.stream("hello", greedy(max_tokens=400))
    next(stream)
    assert thread.stats().blocks_used > 0
    stream.close()
    wait_idle(thread)


def test_close_ends_every_request_exactly_once(thread: EngineThread) -> None:
    ends: list[RequestOutput] = []
    started = threading.Event()

    def on_output(output: RequestOutput) -> None:
        started.set()
        if output.finished:
            ends.append(output)

    ids = [thread.submit("hello", greedy(max_tokens=400), on_output=on_output) for _ in range(30)]
    started.wait(10)
    thread.close()
    assert sorted(output.request_id for output in ends) == sorted(ids)
    assert {output.finish_reason for output in ends} == {"abort"}
    with pytest.raises(EngineDead):
        thread.submit("hello", on_output=on_output)
    thread.close()


def test_waiting_requests_are_bounded_across_threads(tiny_llama_dir: Path) -> None:
    config = EngineConfig(model=str(tiny_llama_dir), **CONFIG | {"max_num_seqs": 1, "max_waiting": 4})
    with EngineThread(lambda: Engine(config)) as thread:
        refused, ended = 0, threading.Semaphore(0)

        def on_output(output: RequestOutput) -> None:
            if output.finished:
                ended.release()

        for _ in range(20):
            try:
                thread.submit("hello", greedy(max_tokens=100), on_output=on_output)
            except Overloaded:
                refused += 1
        assert 10 <= refused <= 16
        for _ in range(20 - refused):
            assert ended.acquire(timeout=20)


def test_a_failing_callback_aborts_its_request_alone(thread: EngineThread) -> None:
    def on_output(output: RequestOutput) -> None:
        raise ValueError("listener is broken")

    thread.submit("hello", greedy(max_tokens=400), on_output=on_output)
    assert thread.generate(["fine"], greedy(max_tokens=5))[0].num_output_tokens == 5
    wait_idle(thread)


def test_callers_step_a_shared_engine_and_leave_nothing_behind(tiny_llama_dir: Path) -> None:
    config = EngineConfig(model=str(tiny_llama_dir), **CONFIG | {"max_waiting": 3})
    with SharedEngine(Engine(config)) as shared:
        want = shared.generate(["a", "b"], greedy(max_tokens=20))
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(lambda prompt: shared.generate([prompt], greedy(max_tokens=20))[0], ["a", "b"]))
        assert [output.token_ids for output in got] == [output.token_ids for output in want]
        stream = shared.stream("a", greedy(max_tokens=400))
        next(stream)
        stream.close()
        assert (shared.stats().num_running, shared.stats().blocks_used) == (0, 0)
        with pytest.raises(Overloaded):
            shared.generate(["a"] * 5, greedy(max_tokens=400))
        assert (shared.stats().num_waiting, shared.stats().blocks_used) == (0, 0)
    with pytest.raises(EngineDead):
        shared.run_until(lambda: False)


def test_a_failure_outside_the_step_leaves_nobody_waiting(
    thread: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[RequestOutput]:
        raise AssertionError("unforeseen")

    monkeypatch.setattr(thread.engine, "step", broken)
    (output,) = thread.generate(["hello"], greedy())
    assert str(output.error) == "unforeseen"
    with pytest.raises(EngineDead, match="unforeseen"):
        thread.generate(["hello"])
    monkeypatch.undo()


class Dies:
    @hookimpl
    def paged_logits_processor(self, config: EngineConfig) -> Any:
        def process(logits: Any, requests: Any) -> None:
            raise RuntimeError("out of memory")

        return process


def test_a_dead_engine_answers_every_request_and_refuses_new_ones(tiny_llama_dir: Path) -> None:
    with EngineThread(lambda: Engine(EngineConfig(model=str(tiny_llama_dir), **CONFIG), plugins=[Dies()])) as thread:
        (output,) = thread.generate(["hello"], greedy())
        assert output.finish_reason == "error"
        assert "out of memory" in str(output.error)
        assert thread.error is not None
        with pytest.raises(EngineDead, match="out of memory"):
            thread.generate(["hello"])


def test_an_error_in_the_engine_itself_still_answers(thread: EngineThread, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> RequestOutput:
        raise AssertionError("engine bug")

    monkeypatch.setattr(thread.engine, "_commit", broken)
    (output,) = thread.generate(["hello"], greedy())
    assert str(output.error) == "engine bug"
    assert thread.stats().blocks_used == 0


def test_asyncio_tasks_stream_cancel_and_gather(tiny_llama_dir: Path) -> None:
    async def run() -> None:
        engine = AsyncEngine(EngineConfig(model=str(tiny_llama_dir), **CONFIG))
        try:
            whole = await asyncio.gather(*(engine.generate(f"p{i}", greedy(max_tokens=8)) for i in range(8)))
            assert [output.num_output_tokens for output in whole] == [8] * 8
            parts = [part async for part in engine.stream("p3", greedy(max_tokens=8))]
            assert [token for part in parts for token in part.token_ids] == whole[3].token_ids
            task = asyncio.create_task(engine.generate("hello", greedy(max_tokens=400)))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(InvalidArgument):
                await engine.generate("")
            for _ in range(500):
                if not engine.stats().num_running:
                    break
                await asyncio.sleep(0.01)
            assert engine.stats().num_running == 0
        finally:
            await engine.close()

    asyncio.run(run())
