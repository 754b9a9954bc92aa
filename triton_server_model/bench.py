"""How much of the engine's own throughput reaches the clients of a real tritonserver."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import multiprocessing.synchronize
import random
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from paged_backend import models
from paged_backend.bench import shapes
from paged_backend.bench.workloads import Workload
from paged_backend.config import EngineConfig
from paged_backend.pacing import num_cores
from triton_server_model.launcher import MODEL_NAME, ServerError, TritonServer, free_ports
from triton_server_model.top import Totals, parse

if TYPE_CHECKING:
    from tritonclient.grpc import InferResult

    from paged_backend.bench.throughput import OurEngine

_CLIENTS = max(1, min(8, num_cores() // 2))
"""Processes that share the streams: one takes some 10,000 responses a second, measured with a client of threads."""
_FIRST_CHARACTER = 0x10000
_WEIGHTS = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.py")
_SPAWN = multiprocessing.get_context("spawn")
_OPEN_SECONDS = 120
_CANCEL_PROMPT_TOKENS = 16
_METRICS_SECONDS = 10
_PARTS = ("queue", "prefill")


@dataclass(frozen=True, slots=True)
class Timing:
    """What came back on one stream; times are `time.monotonic()` seconds, one clock for all processes."""

    sent: float
    first: float
    """When the first response came."""
    last: float
    responses: int
    tokens: int


@dataclass(slots=True)
class Point:
    """One number of streams, all started at once."""

    streams: int
    seconds: float
    """From the first request to the last response."""
    tokens_per_second: float
    """Output tokens that reached the clients."""
    engine_tokens_per_second: float
    """Of the same requests given to an engine in a process without a server."""
    ttft_p50_ms: float
    ttft_p99_ms: float
    queue_ms: float
    """Of the time to first token, in the mean: from the backend's taking the request until the engine begins it."""
    prefill_ms: float
    """Likewise: from then until the first token is there. The rest is the server's, the backend's and the client's."""
    inter_token_p50_ms: float
    """Over the streams, of each one's mean after its first response."""
    tokens_per_response: float
    share: float
    """The part of the engine's throughput that reaches the clients: the median of the runs', each beside the engine's
    runs before and after it, where they are in turns. A machine that others use, too, is faster in one minute than in
    the next."""

    def document(self) -> dict[str, float]:
        """What goes into the JSON file."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


@contextlib.contextmanager
def countable(config: EngineConfig) -> Iterator[tuple[EngineConfig, int]]:
    """The config with a model whose every token is one character, and its vocabulary size.

    The weights are those of `config.model`, or random ones of `shapes.SHAPES`. Only text goes over the wire: with such
    a tokenizer any token ids can be sent, and the tokens that come back can be counted.
    """
    name = config.require_model()
    with tempfile.TemporaryDirectory(prefix="paged-backend-bench-") as folder:
        path = Path(folder, Path(name).name)
        path.mkdir()
        if name in shapes.SHAPES:
            shapes.save_random(name, path)
        else:
            source = models.resolve(name, config.revision).resolve()
            for file in (file for pattern in _WEIGHTS for file in source.glob(pattern)):
                (path / file.name).symlink_to(file)
        vocab_size = _save_tokenizer(path, config.trust_remote_code)
        yield config.model_copy(update={"model": str(path), "revision": None}), vocab_size


def _save_tokenizer(path: Path, trust_remote_code: bool) -> int:
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, PreTrainedTokenizerFast

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    vocab_size: int = config.get_text_config().vocab_size
    tokenizer = Tokenizer(WordLevel({_text([token]): token for token in range(vocab_size)}, unk_token=_text([0])))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return vocab_size


def _text(token_ids: Sequence[int]) -> str:
    return "".join(chr(_FIRST_CHARACTER + token) for token in token_ids)


def measure(
    config: EngineConfig,
    vocab_size: int,
    streams: Sequence[int],
    prompt_tokens: int,
    output_tokens: int,
    repeat: int,
    report: Callable[[str], None] = lambda line: None,
) -> list[Point]:
    """Greedy requests of random prompts, through a tritonserver and on an engine alone.

    On a CPU they run in turns; a GPU's memory is for one, so there the engine follows when the server is gone.
    `config` and `vocab_size` are of `countable`. Each number of streams runs once to warm up and `repeat` times timed,
    always with other prompts; the run of median speed counts. Raises `ServerError` when a stream fails or brings
    another number of tokens than `output_tokens`.
    """
    from paged_backend.bench.throughput import OurEngine
    from paged_backend.runner.loader import resolve_device

    def workload(count: int, seed: str) -> Workload:
        rng = random.Random(f"{count} {seed}")
        prompts = [[rng.randrange(vocab_size) for _ in range(prompt_tokens)] for _ in range(count)]
        return Workload(seed, [(prompt, output_tokens) for prompt in prompts])

    http_port, grpc_port, metrics_port = free_ports(3)
    seeds = [f"run {number}" for number in range(1 + repeat)]  # the first to warm up
    workloads = {count: [workload(count, seed) for seed in seeds] for count in streams}
    served: dict[int, tuple[list[list[Timing]], Totals]] = {}
    rates: dict[int, list[float]] = {count: [] for count in streams}
    with contextlib.ExitStack() as engines:

        def load() -> OurEngine:
            report("loading the engine alone")
            engine = OurEngine(config)
            engines.callback(engine.engine.close)
            return engine

        alone = load() if resolve_device(config.device).type == "cpu" else None
        report("starting tritonserver")
        with TritonServer(config, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port) as server:
            requests = 0
            for count in streams:
                report(f"tritonserver{'' if alone is None else ' and engine in turns'}: {count} at once")
                runs, totals = [], []
                all_timings = _serve(server.address("grpc"), workloads[count])
                for timed, timings in zip(workloads[count], all_timings, strict=True):
                    requests += count
                    runs.append(timings)
                    totals.append(_totals(server, requests))
                    if alone is not None:
                        rates[count].append(_rate(alone, timed))
                served[count] = runs[1:], totals[-1].since(totals[0])
        if alone is None:
            alone = load()
            for count in streams:
                report(f"engine alone: {count} at once")
                rates[count] += [_rate(alone, timed) for timed in workloads[count]]
    return [_point(*served[count], rates[count]) for count in streams]


def _rate(engine: OurEngine, workload: Workload) -> float:
    """Output tokens a second."""
    start = time.monotonic()
    engine.run(workload)
    return workload.output_tokens / (time.monotonic() - start)


def measure_cancel(config: EngineConfig, vocab_size: int, repeat: int) -> list[float]:
    """Seconds from a client's cancelling until what its request held serves another one, `repeat` times.

    The engine runs one request at a time. A second one waits behind the first, which is cancelled; until the second's
    first token the engine has to notice, free, and compute that token: what this takes alone is subtracted.
    `config` and `vocab_size` are of `countable`. Raises `ServerError`.
    """
    from transformers import AutoConfig

    text_config = AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code).get_text_config()
    most = text_config.max_position_embeddings - _CANCEL_PROMPT_TOKENS
    http_port, grpc_port, metrics_port = free_ports(3)
    config = config.model_copy(update={"max_num_seqs": 1})
    with TritonServer(config, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port) as server:
        return asyncio.run(_cancelled(server.address("grpc"), vocab_size, most, repeat))


async def _cancelled(address: str, vocab_size: int, most: int, repeat: int) -> list[float]:
    rng = random.Random(0)

    def stream(output_tokens: int) -> _Stream:
        return _Stream(address, [rng.randrange(vocab_size) for _ in range(_CANCEL_PROMPT_TOKENS)], output_tokens)

    async def alone() -> float:
        async with stream(2) as only:
            await only.run()
        return only.timing().first - only.timing().sent

    await alone()  # to warm up
    baseline = statistics.median([await alone() for _ in range(5)])
    taken = []
    for _ in range(repeat):
        async with stream(most) as running, stream(2) as waiting:
            first = asyncio.create_task(running.run())
            await running.begun.wait()
            second = asyncio.create_task(waiting.run())
            await asyncio.sleep(rng.uniform(0.05, 0.15))  # at any time between two looks
            cancelled = time.monotonic()
            first.cancel()
            await second
            with contextlib.suppress(asyncio.CancelledError):
                await first  # raises, if it failed before
        taken.append(waiting.timing().first - cancelled - baseline)
    return taken


def _totals(server: TritonServer, requests: int) -> Totals:
    """The server's metrics once they tell of so many requests: they are brought up to date once a second."""
    deadline = time.monotonic() + _METRICS_SECONDS
    while time.monotonic() < deadline:
        (totals,) = parse(httpx.get(f"http://{server.address('metrics')}/metrics", trust_env=False).text).values()
        if totals.values["prefill_seconds_count"] >= requests:
            return totals
        time.sleep(0.1)
    raise ServerError(f"the metrics tell of {totals.values['prefill_seconds_count']:.0f} of {requests} requests")


def _point(runs: list[list[Timing]], told: Totals, engine_rates: list[float]) -> Point:
    """`engine_rates` has one before all `runs` and one after each; on a GPU, they were all measured later."""
    import numpy as np

    beside = [statistics.mean(both) for both in itertools.pairwise(engine_rates)]
    shares = [sum(one.tokens for one in run) / _seconds(run) / rate for run, rate in zip(runs, beside, strict=True)]
    timings = sorted(runs, key=_seconds)[len(runs) // 2]
    seconds, tokens = _seconds(timings), sum(timing.tokens for timing in timings)
    ttft_p50, ttft_p99 = np.percentile([timing.first - timing.sent for timing in timings], [50, 99])
    queue, prefill = (told.values[f"{name}_seconds_sum"] / told.values[f"{name}_seconds_count"] for name in _PARTS)
    between = np.median([(timing.last - timing.first) / (timing.tokens - 1) for timing in timings])
    return Point(
        streams=len(timings),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        engine_tokens_per_second=statistics.median(engine_rates[1:]),
        ttft_p50_ms=float(ttft_p50) * 1e3,
        ttft_p99_ms=float(ttft_p99) * 1e3,
        queue_ms=queue * 1e3,
        prefill_ms=prefill * 1e3,
        inter_token_p50_ms=float(between) * 1e3,
        tokens_per_response=tokens / sum(timing.responses for timing in timings),
        share=statistics.median(shares),
    )


def _seconds(run: list[Timing]) -> float:
    """From the first request to the last response."""
    return max(timing.last for timing in run) - min(timing.sent for timing in run)


def _serve(address: str, workloads: Sequence[Workload]) -> Iterator[list[Timing]]:
    """Timings of one workload after the other, the requests of each at once on connections of their own."""
    clients = min(_CLIENTS, len(workloads[0].requests))
    barrier = _SPAWN.Barrier(clients)
    with ProcessPoolExecutor(clients, _SPAWN, initializer=_share, initargs=(barrier,)) as processes:
        for workload in workloads:
            parts = [workload.requests[number::clients] for number in range(clients)]
            futures = [processes.submit(_client, address, part) for part in parts]
            yield [timing for future in futures for timing in future.result()]


_barrier: multiprocessing.synchronize.Barrier
"""Of the client processes, in each of them: it can only be inherited."""


def _share(barrier: multiprocessing.synchronize.Barrier) -> None:
    global _barrier
    _barrier = barrier
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback


def _client(address: str, requests: list[tuple[list[int], int]]) -> list[Timing]:
    async def run() -> list[Timing]:
        async with contextlib.AsyncExitStack() as connections:
            streams = [await connections.enter_async_context(_Stream(address, *request)) for request in requests]
            _barrier.wait(_OPEN_SECONDS)
            await asyncio.gather(*(stream.run() for stream in streams))
            return [stream.timing() for stream in streams]

    return asyncio.run(run())


class _Stream:
    """One request on a connection of its own, which is there as long as the context.

    It has the asynchronous client: of the other one, each stream has three threads, which wake up 18 times a second
    whether anything has come or not. With 256 streams, these take a tenth of two cores.
    """

    def __init__(self, address: str, prompt: Sequence[int], output_tokens: int) -> None:
        import numpy as np
        from tritonclient.grpc import InferInput
        from tritonclient.grpc.aio import InferenceServerClient

        self._output_tokens = output_tokens
        self._inputs = [InferInput("text_input", [1], "BYTES"), InferInput("stream", [1], "BOOL")]
        self._inputs[0].set_data_from_numpy(np.array([_text(prompt).encode()], dtype=np.object_))
        self._inputs[1].set_data_from_numpy(np.array([True]))
        self._responses: list[tuple[float, InferResult]] = []
        self.begun = asyncio.Event()
        """The first response has come, or the end."""
        arguments = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        self._client = InferenceServerClient(address, channel_args=arguments)

    async def __aenter__(self) -> _Stream:
        await self._client.is_server_live()  # connects
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def run(self) -> None:
        """Send the request, and wait for the last response; cancels the request when it is cancelled itself.

        Raises `ServerError` when the request fails.
        """
        import grpc

        self._sent = time.monotonic()
        try:
            async for result, error in self._client.stream_infer(self._request()):
                if error is not None:
                    raise ServerError(error.message())
                self._responses.append((time.monotonic(), result))  # read when all is over
                self.begun.set()
        except grpc.aio.AioRpcError as error:  # the server has gone
            raise ServerError(f"{error.code().name}: {error.details()}") from None
        finally:
            self.begun.set()

    async def _request(self) -> AsyncIterator[dict[str, Any]]:
        parameters = {"max_tokens": self._output_tokens, "temperature": "0", "ignore_eos": True}
        yield {"model_name": MODEL_NAME, "inputs": self._inputs, "parameters": parameters}

    def timing(self) -> Timing:
        """Of a stream that has ended. Raises `ServerError` unless all tokens that were asked for came."""
        texts = [result.as_numpy("text_output")[0].decode() for _, result in self._responses]
        tokens = sum(map(len, texts))
        if tokens != self._output_tokens:
            raise ServerError(f"a stream brought {tokens} of {self._output_tokens} tokens")
        return Timing(self._sent, self._responses[0][0], self._responses[-1][0], len(texts), tokens)
