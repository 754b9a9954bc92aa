"""An engine in a process of its own, without a server."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric

from paged_backend import (
    DeadlineExceeded,
    Engine,
    EngineConfig,
    EngineDead,
    InvalidArgument,
    Overloaded,
    RequestOptions,
    RequestOutput,
    SamplingParams,
    engine_worker,
)
from paged_backend import engine_process as module
from paged_backend.engine_messages import Packer, Unpacker
from paged_backend.engine_process import EngineProcess
from paged_backend.engine_worker import Worker
from tests import trouble

CONFIG = {
    "dtype": "float32",
    "device": "cpu",
    "num_blocks": 256,
    "max_num_seqs": 8,
    "max_waiting": 16,
    "stream_share": 1,
}
LONG = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)


def start(model: Path, **environment: str) -> EngineProcess:
    config = EngineConfig(model=str(model), **CONFIG)
    return EngineProcess(config, environment={"OMP_NUM_THREADS": "1"} | environment)


class Listener:
    """Receives, and knows all outputs of every request."""

    def __init__(self, engine: EngineProcess) -> None:
        self.engine = engine
        self.outputs: dict[str, list[RequestOutput]] = defaultdict(list)

    def until(self, done: Callable[[], bool], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, {name: outputs[-1] for name, outputs in self.outputs.items()}
            for output in self.engine.receive(0.02):
                assert not self.ended(output.request_id)
                self.outputs[output.request_id].append(output)

    def ended(self, name: str) -> bool:
        return bool(self.outputs[name]) and self.outputs[name][-1].finished

    def last(self, name: str) -> RequestOutput:
        self.until(lambda: self.ended(name))
        return self.outputs[name][-1]

    def metric(self, name: str) -> float:
        collected: list[Metric] = []
        thread = threading.Thread(target=lambda: collected.extend(self.engine.collect()))
        thread.start()
        self.until(lambda: not thread.is_alive())
        (value,) = (s.value for metric in collected for s in metric.samples if s.name == f"paged_backend_{name}")
        return value


@pytest.fixture(scope="module")
def engine(tiny_llama_dir: Path) -> Iterator[EngineProcess]:
    """For the tests that leave it alive."""
    engine = start(tiny_llama_dir)
    yield engine
    engine.close()
    assert engine.receive(1) == []
    assert str(engine.error) == "the engine was closed"
    assert engine.process.returncode == 0


@pytest.fixture
def troubled(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineProcess]:
    """With the plugin of `trouble`, for one test that may kill it."""
    trouble.install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    engine = start(tiny_llama_dir)
    yield engine
    engine.process.kill()
    engine.close()


def test_outputs_are_those_of_an_engine_in_this_process(engine: EngineProcess, tiny_llama_dir: Path) -> None:
    requests: dict[str, tuple[str | list[int], SamplingParams]] = {
        "greedy": ("the quick brown fox", SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)),
        "tokens": ([5, 6, 7], SamplingParams(max_tokens=9, seed=3, ignore_eos=True)),
        "three": ("jumps over", SamplingParams(n=3, max_tokens=12, seed=5, ignore_eos=True)),
        "beams": ("lazy dogs", SamplingParams(beam_width=2, n=2, max_tokens=6)),
        "stopped": ("it", SamplingParams(max_tokens=60, temperature=0, stop=("e",), ignore_eos=True)),
        "one": ("a", SamplingParams(max_tokens=1, temperature=0)),
    }
    ours = Engine(EngineConfig(model=str(tiny_llama_dir), **CONFIG))
    expected: dict[str, list[RequestOutput]] = defaultdict(list)
    for name, (prompt, params) in requests.items():
        ours.add_request(prompt, params, request_id=name)
        while ours.has_work:
            for output in ours.step():
                expected[name].append(output)
    ours.close()

    began, listener = time.monotonic(), Listener(engine)
    for name, (prompt, params) in requests.items():
        engine.submit(name, prompt, params)
        assert listener.last(name).end_time is not None
        untimed = [
            [
                dataclasses.replace(output, arrival_time=0, scheduled_time=None, first_token_time=None, end_time=None)
                for output in sorted(outputs, key=lambda output: output.index)
            ]
            for outputs in (listener.outputs[name], expected[name])
        ]
        assert untimed[0] == untimed[1]
        for output in listener.outputs[name]:
            assert output.first_token_time is not None
            assert began < output.arrival_time < output.first_token_time < time.monotonic()


def test_only_the_process_of_the_engine_has_torch(engine: EngineProcess) -> None:
    code = "import sys, paged_backend.engine_process; print({'torch', 'transformers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
    assert "libtorch" in Path(f"/proc/{engine.process.pid}/maps").read_text()
    command = Path(f"/proc/{engine.process.pid}/cmdline").read_text().split("\0")
    assert command[0].startswith(sys.prefix)


def test_bad_input_fails_alone_with_its_own_error(engine: EngineProcess) -> None:
    listener = Listener(engine)
    engine.submit("empty", "")
    engine.submit("token", [5, 999])
    engine.submit("fine", "fine", LONG)
    with pytest.raises(InvalidArgument, match="request_id='fine': is in use"):
        engine.submit("fine", "fine")
    error = listener.last("token").error
    assert isinstance(error, InvalidArgument)
    assert (error.field, error.value, error.allowed) == ("prompt[1]", 999, "must be a token id in 0..258")
    assert str(error) == "prompt[1]=999: must be a token id in 0..258"
    assert str(listener.last("empty").error) == "prompt='': must have at least one token"
    assert listener.last("fine").finish_reason == "length"


def test_overload_and_abort(engine: EngineProcess) -> None:
    listener, names = Listener(engine), [f"request {number}" for number in range(80)]
    for name in names:
        engine.submit(name, "hello", LONG)
    listener.until(lambda: sum(map(listener.ended, names)) >= 40)
    for name in [*names, "unknown"]:
        engine.abort(name)
    lasts = [listener.last(name) for name in names]
    assert sum(last.finish_reason == "abort" for last in lasts) >= CONFIG["max_num_seqs"]
    refused = [last.error for last in lasts if last.finish_reason != "abort"]
    assert {type(error) for error in refused} == {Overloaded}
    assert "max_waiting is 16" in str(refused[0])


def test_metrics(engine: EngineProcess) -> None:
    listener = Listener(engine)
    before = listener.metric("output_tokens_total")
    engine.submit("five", "hello", SamplingParams(max_tokens=5, ignore_eos=True))
    listener.last("five")
    assert listener.metric("output_tokens_total") - before == 5


def test_an_abort_waits_for_nothing(engine: EngineProcess) -> None:
    listener = Listener(engine)
    engine.submit("running", "hello", LONG)
    listener.until(lambda: bool(listener.outputs["running"]))
    os.kill(engine.process.pid, signal.SIGSTOP)
    try:
        big = threading.Thread(target=engine.submit, args=("big", "x" * 2**20))
        big.start()
        while not engine._sending.locked():
            time.sleep(0.001)
        began = time.monotonic()
        engine.abort("running")
        listener.until(lambda: not engine.receive(0))
        assert time.monotonic() - began < 1
        assert big.is_alive()
    finally:
        os.kill(engine.process.pid, signal.SIGCONT)
    assert "has 1048576 characters, more than 511 tokens; at most 511 are allowed" in str(listener.last("big").error)
    assert listener.last("running").finish_reason in ("abort", "length")


def test_the_time_before_the_engine_knows_of_it_counts(engine: EngineProcess) -> None:
    listener = Listener(engine)
    os.kill(engine.process.pid, signal.SIGSTOP)
    try:
        engine.submit("late", "hello", options=RequestOptions(timeout=0.1))
        engine.submit("fine", "hello", SamplingParams(max_tokens=1))
        told = time.monotonic()
        time.sleep(0.2)
    finally:
        os.kill(engine.process.pid, signal.SIGCONT)
    error = listener.last("late").error
    assert isinstance(error, DeadlineExceeded)
    assert str(error).startswith("timeout=0.1: the request was ended after 0.")
    fine = listener.last("fine")
    assert fine.arrival_time < told < told + 0.2 < (fine.scheduled_time or 0)


def test_a_fatal_error_is_told_to_all(troubled: EngineProcess) -> None:
    listener = Listener(troubled)
    kinds = {trouble.UNPICKLABLE: RuntimeError, trouble.STRANGER: OSError, trouble.QUOTA: Overloaded}
    texts = {trouble.UNPICKLABLE: "it holds a lambda", trouble.STRANGER: "no such thing", trouble.QUOTA: "used 7"}
    for seed, kind in kinds.items():
        troubled.submit(f"seed {seed}", "hello", SamplingParams(seed=seed))
        error = listener.last(f"seed {seed}").error
        assert type(error) is kind
        assert texts[seed] in str(error)
    assert troubled.error is None

    for name in "abc":
        troubled.submit(name, "hello", LONG)
    listener.until(lambda: all(listener.outputs[name] for name in "abc"))
    troubled.submit("fatal", "hello", SamplingParams(seed=trouble.FATAL))
    listener.until(lambda: troubled.error is not None)
    for name in ("a", "b", "c", "fatal"):
        error = listener.last(name).error
        assert isinstance(error, EngineDead)
        assert str(error) == "the engine has stopped: no memory is left on the device"
    with pytest.raises(EngineDead, match="no memory is left on the device"):
        troubled.submit("late", "hello")
    assert troubled.process.wait(5) == 0
    assert listener.metric("output_tokens_total") >= 3
    assert (listener.metric("requests_running"), listener.metric("kv_blocks_total")) == (0, 256)


def test_log_records_arrive_without_what_cannot_be_sent(
    troubled: EngineProcess, caplog: pytest.LogCaptureFixture
) -> None:
    listener = Listener(troubled)
    troubled.submit("talkative", "hello", SamplingParams(seed=trouble.TALKATIVE, max_tokens=1))
    assert listener.last("talkative").error is None
    (record,) = (record for record in caplog.records if record.name == "paged_backend_trouble")
    message, *traceback = record.getMessage().splitlines()
    assert message == f"100 % of {threading.Lock!r}"
    assert traceback[-1] == "KeyError: 'cause'"
    assert (record.levelname, record.levelno, record.request_id) == ("ERROR", logging.ERROR, "talkative")  # type: ignore[attr-defined]
    assert time.time() - 60 < record.created < time.time()
    assert not hasattr(record, "lock")


def test_a_killed_process_fails_what_is_open(troubled: EngineProcess) -> None:
    """Whether it runs, waits or is still in the pipe."""
    listener, names = Listener(troubled), [f"request {number}" for number in range(8 + 4)]
    for name in names[:8]:
        troubled.submit(name, "hello", LONG)
    listener.until(lambda: all(listener.outputs[name] for name in names[:8]))
    os.kill(troubled.process.pid, signal.SIGSTOP)
    for name in names[8:]:
        troubled.submit(name, "hello", LONG)
    os.kill(troubled.process.pid, signal.SIGKILL)
    began = time.monotonic()
    listener.until(lambda: troubled.error is not None)
    assert time.monotonic() - began < 1
    cause = "the engine process was killed by SIGKILL, as the kernel does when memory runs out"
    for name in names:
        assert isinstance(listener.last(name).error, EngineDead)
        assert str(listener.last(name).error) == cause
    with pytest.raises(EngineDead, match=cause):
        troubled.submit("late", "hello")
    assert troubled.receive(10) == []


def test_close_ends_every_request_exactly_once(tiny_llama_dir: Path) -> None:
    engine = start(tiny_llama_dir)
    listener, names = Listener(engine), [f"request {number}" for number in range(12)]
    for name in names:
        engine.submit(name, "hello", LONG)
    listener.until(lambda: any(listener.outputs[name] for name in names))
    closing = threading.Thread(target=engine.close)
    closing.start()
    listener.until(lambda: engine.error is not None)
    closing.join()
    assert {listener.last(name).finish_reason for name in names} <= {"abort", "error"}
    assert sum(listener.last(name).finish_reason == "abort" for name in names) == 12
    assert engine.process.returncode == 0
    engine.close()
    with pytest.raises(EngineDead, match="the engine was closed"):
        engine.submit("late", "hello")


def test_closing_a_stuck_engine_kills_it(troubled: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CLOSE_SECONDS", 0.5)
    listener = Listener(troubled)
    troubled.submit("stuck", "hello", SamplingParams(seed=trouble.STUCK))
    listener.until(lambda: listener.metric("requests_running") == 1)
    troubled.close()
    assert isinstance(listener.last("stuck").error, EngineDead)
    assert troubled.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("how", [trouble.STUCK, trouble.STUCK_WITH_LOCK])
def test_an_engine_that_hangs_is_killed(troubled: EngineProcess, how: int) -> None:
    listener = Listener(troubled)
    troubled.submit("fine", "hello", SamplingParams(max_tokens=3))
    assert listener.last("fine").error is None
    troubled._step_timeout = 0.5
    time.sleep(0.6)
    listener.until(lambda: not troubled.receive(0.1))  # not while there is nothing to do
    troubled.submit("stuck", "hello", SamplingParams(seed=how))
    troubled.submit("behind it", "hello")
    for name in ("stuck", "behind it"):
        error = listener.last(name).error
        assert isinstance(error, EngineDead)
        assert str(error) == "the engine hangs: a step has not ended after step_timeout=0.5 s"
    assert troubled.process.wait(5) == -signal.SIGKILL
    with pytest.raises(EngineDead, match="the engine hangs"):
        troubled.submit("late", "hello")


PARENT = """
import ctypes, sys, time
from paged_backend import EngineConfig, SamplingParams
from paged_backend.engine_process import EngineProcess

if __name__ == "__main__":
    engine = EngineProcess(EngineConfig(model=sys.argv[1], num_blocks=64, device="cpu"), with_parent=True)
    print(engine.process.pid, flush=True)
    engine.submit("request", "hello", SamplingParams(seed=int(sys.argv[2])))
    ctypes.PyDLL(None).sleep(1000)  # with the interpreter's lock held, which no other thread gets then
"""
GRANDPARENT = "import subprocess, sys; subprocess.run(sys.argv[1:])"


@pytest.mark.parametrize("killed", ["parent", "grandparent"])
def test_it_ends_with_its_parent_and_that_with_its_own(tiny_llama_dir: Path, tmp_path: Path, killed: str) -> None:
    """Even in the middle of a step; after 1.5 s."""
    trouble.install(tmp_path)
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, "-c", GRANDPARENT, sys.executable, str(tmp_path / "parent.py")]
    command += [str(tiny_llama_dir), str(trouble.STUCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as grandparent:
        assert grandparent.stdout is not None
        child = psutil.Process(int(grandparent.stdout.readline()))
        assert grandparent.stdout.readline() == "stuck\n"
        processes = [child, child.parent()]
        (processes[1] if killed == "parent" else grandparent).kill()
    began = time.monotonic()
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        assert time.monotonic() - began < 5
        time.sleep(0.05)


def test_what_hinders_the_start_is_raised(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"max_model_len=9999: at most 512, the model's context") as raised:
        EngineProcess(EngineConfig(model=str(tiny_llama_dir), max_model_len=9999, device="cpu"))
    assert raised.value.field == "max_model_len"
    trouble.install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineDead, match="the engine process exited with code 7 while it loaded the model"):
        start(tiny_llama_dir, **{trouble.DIES_AT_START: "1"})


def test_threads_that_wait_do_not_spin_for_long(engine: EngineProcess) -> None:
    variables = Path(f"/proc/{engine.process.pid}/environ").read_bytes().split(b"\0")
    assert b"GOMP_SPINCOUNT=20000" in variables


def test_tokens_in_pieces(engine: EngineProcess, tiny_llama_dir: Path) -> None:
    config = EngineConfig(model=str(tiny_llama_dir), **CONFIG, stream_interval=4)
    pieces = Listener(EngineProcess(config, environment={"OMP_NUM_THREADS": "1"}))
    single = Listener(engine)
    params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    for listener in (pieces, single):
        listener.engine.submit("plain", "the quick brown fox", params)
        listener.engine.submit("logprobs", "the lazy dog", params.model_copy(update={"logprobs": 0}))
        assert listener.last("plain").num_output_tokens == listener.last("logprobs").num_output_tokens == 10
    assert [len(output.token_ids) for output in pieces.outputs["plain"]] == [1, 4, 4, 1]
    assert [len(output.token_ids) for output in pieces.outputs["logprobs"]] == 10 * [1]
    for name in ("plain", "logprobs"):
        ours, theirs = ("".join(output.text for output in listener.outputs[name]) for listener in (pieces, single))
        assert ours == theirs
    pieces.engine.close()


@pytest.mark.parametrize(("share", "most"), [(0.001, 28), (1, 1)])
def test_tokens_wait_for_each_other(tiny_llama_dir: Path, share: float, most: int) -> None:
    config = EngineConfig(model=str(tiny_llama_dir), **CONFIG | {"stream_share": share})
    engine = EngineProcess(config, environment={"OMP_NUM_THREADS": "1"})
    engine.submit("a", "the quick brown fox", SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))
    outputs: list[RequestOutput] = []
    while not (outputs and outputs[-1].finished):
        outputs += engine.receive(1)
    tokens = [len(output.token_ids) for output in outputs]
    assert [output.num_output_tokens for output in outputs] == list(itertools.accumulate(tokens))
    assert (tokens[0], max(tokens), sum(tokens)) == (1, most, 30)
    engine.close()
    for thread in threading.enumerate():  # other tests are no servers
        os.sched_setscheduler(thread.native_id or 0, os.SCHED_OTHER, os.sched_param(0))


@pytest.mark.parametrize(("share", "policy"), [(0.5, "SCHED_BATCH"), (1, "SCHED_OTHER")])
def test_the_owner_leaves_cores_to_the_engine(tiny_llama_dir: Path, share: float, policy: str) -> None:
    """And an engine that an owner under that policy starts takes them."""
    program = f"""
import os, threading
from paged_backend.config import EngineConfig
from paged_backend.engine_process import EngineProcess
end = threading.Event()
other = threading.Thread(target=end.wait)
other.start()
for _ in range(2):
    engine = EngineProcess(EngineConfig(**{CONFIG | {"stream_share": share, "model": str(tiny_llama_dir)}}))
    engine.submit("a", "the quick brown fox")
    while not any(output.finished for output in engine.receive(1)):
        pass
    threads = 0, other.native_id, engine.process.pid
    print(*(os.sched_getscheduler(thread) for thread in threads))
    engine.close()
end.set()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    wanted = getattr(os, policy)
    assert done.stdout.split("\n") == [*2 * [f"{wanted} {wanted} {os.SCHED_OTHER}"], ""]


@pytest.mark.parametrize(("quiet", "longest"), [(0.3, 60), (60, 0.3)])
def test_an_idle_engine_waits_for_requests_that_come_together(
    monkeypatch: pytest.MonkeyPatch, quiet: float, longest: float
) -> None:
    """Until none comes, or for some time."""
    monkeypatch.setattr(engine_worker, "_QUIET_SECONDS", quiet)
    monkeypatch.setattr(engine_worker, "_GATHER_SECONDS", longest)
    worker = Worker(mock.Mock(), mock.Mock(), [])
    state, submitted = worker._state, worker._submitted
    with state:
        worker._gather()  # for nobody
        submitted.append(mock.Mock())

        def send() -> None:
            for _ in range(3):
                time.sleep(0.01)
                with state:
                    submitted.append(mock.Mock())
                    state.notify()

        sender = threading.Thread(target=send)
        sender.start()
        began = time.monotonic()
        worker._gather()
        assert 0.3 <= time.monotonic() - began < 30
    sender.join()
    assert len(submitted) == 4


@given(st.data())
def test_packing(data: st.DataObject) -> None:
    """Steps of a few requests with two sequences each, any of which may begin and end within one step."""
    interval = data.draw(st.sampled_from([1, 1, 3]))
    packer, unpacker, number = Packer(interval), Unpacker(), 0
    live: dict[str, list[int]] = {}
    """Tokens of each sequence."""
    sent, got = defaultdict[tuple[str, int], list[RequestOutput]](list), defaultdict[Any, list[RequestOutput]](list)
    for _ in range(data.draw(st.integers(1, 6))):
        step: list[RequestOutput] = []
        for _ in range(data.draw(st.integers(0, 8))):
            if len(live) < 3 and data.draw(st.booleans()):
                live[f"request {number}"] = [0, 0]
                number += 1
            if not live:
                continue
            name, index = data.draw(st.sampled_from(sorted(live))), data.draw(st.integers(0, 1))
            end = data.draw(st.sampled_from([None, None, None, "length", "error"]))
            token_ids = data.draw(st.lists(st.integers(0, 9), min_size=end is None, max_size=2))
            live[name][index] += len(token_ids)
            step.append(
                RequestOutput(
                    name,
                    data.draw(st.text(max_size=2)),
                    token_ids,
                    num_prompt_tokens=len(name) + index,
                    num_output_tokens=live[name][index],
                    finish_reason=end,
                    error=InvalidArgument("field", end, "allowed") if end == "error" else None,
                    finished=end is not None,
                    index=index,
                    arrival_time=float(name[-1]),
                )
            )
            if end is not None:
                del live[name]
        for outputs, log in ((copy.deepcopy(step), sent), (_travelled(packer, unpacker, step), got)):
            for output in outputs:
                log[output.request_id, output.index].append(output)
    assert got.keys() == sent.keys()
    for key, ours in sent.items():
        theirs = got[key]
        (our_text, our_tokens), (text, tokens) = map(_joined, (ours, theirs))
        assert theirs[0].token_ids == ours[0].token_ids
        assert our_tokens[: len(tokens)] == tokens
        assert our_text.startswith(text)
        assert theirs[-1].num_output_tokens == len(tokens)
        if interval == 1 or ours[-1].finished:
            assert (our_text, our_tokens) == (text, tokens)
            ends = (dataclasses.replace(outputs[-1], text="", token_ids=[]) for outputs in (ours, theirs))
            assert str(next(ends)) == str(next(ends))


def _joined(outputs: list[RequestOutput]) -> tuple[str, list[int]]:
    return "".join(output.text for output in outputs), [token for output in outputs for token in output.token_ids]


def _travelled(packer: Packer, unpacker: Unpacker, step: list[RequestOutput]) -> list[RequestOutput]:
    return unpacker.unpack(pickle.loads(pickle.dumps(packer.pack(step))))
