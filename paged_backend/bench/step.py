"""Where the time of a step goes: its kernels by kind, beside the bytes that the model's shapes say they must move."""

from __future__ import annotations

import math
import random
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from paged_kernels.attention import LayerSpec
from paged_kernels.cpu import library
from paged_kernels.cpu.structures import Seconds
from torch import nn
from torch.profiler import ProfilerActivity, profile

from paged_backend.bench.shapes import make_engine
from paged_backend.config import EngineConfig
from paged_backend.engine import Engine
from paged_backend.errors import InvalidArgument
from paged_backend.request import SamplingParams
from paged_backend.runner.loader import resolve_device
from paged_backend.runner.probe import probe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = 20
"""Measured, once for their time and once for their kernels."""
_WARM_UP = 3
_BEFORE = _WARM_UP + STEPS + STEPS // 2  # steps before the middle of those that are profiled

# The first that matches counts. Our kernels by their names, the others by parts of theirs; aten::, mkldnn:: and paged_
# are on a CPU, where attention rotates and caches too.
_KINDS = (
    ("decode attention", r"_decode"),
    ("shared prefix", r"_shared"),
    ("prefill attention", r"_prefill"),
    ("attention", r"paged_attention.*|.*(scaled_dot_product|flash|fmha|sdpa).*"),
    (
        "linears",
        r"_gemv|_few_rows|.*(nvjet|gemm|gemv|cutlass|splitK).*|aten::(mm|addmm|bmm|baddbmm)"
        r"|mkldnn::_linear_pointwise|paged_.*linear.*",
    ),
    ("norms", r"(paged)?_add_norm.*"),
    ("rope and cache", r"_rope_and_write"),
    ("activation", r"(paged)?_gated.*|aten::(silu|gelu)"),
    (
        "sampling",
        r"_summarise|_choose|_add|_penalise|_count|aten::(argmax|a?max|isfinite|sort|topk|_?softmax|cumsum|exponential_)",
    ),
    ("elementwise", r"aten::(add|sub|mul|div|neg|pow|mean|rsqrt|abs|eq|ne)_?"),
    ("step", r"_plan|locate|_apply"),
    ("copies", r"Mem(cpy|set).*|.*copy.*"),
    ("other", r".*"),
)


@dataclass(slots=True)
class Kernels:
    """The kernels of one kind, in a step."""

    kind: str
    calls: float
    microseconds: float
    share: float
    """Of the time of all kernels."""
    model_bytes: float | None
    """What they must read and write at least, each thing once. None where nothing is known."""
    gb_per_second: float | None
    """Of `model_bytes`."""
    of_copy: float | None
    """That, as a fraction of `StepProfile.copy_gb_per_second`."""


@dataclass(slots=True)
class StepProfile:
    """Of one step, the mean of `STEPS`."""

    rows: int
    tokens: int
    """Of each row in this step."""
    context: float
    """Tokens of a row after it, the mean of the rows."""
    wall_microseconds: float
    """Without the profiler; on a CPU the median."""
    kernel_microseconds: float
    """Time in which a kernel ran; on a CPU, in the operators of the thread that steps, slowed by the profiler."""
    copy_gb_per_second: float
    """Read and written by a large copy on the same device."""
    kernels: list[Kernels]

    @property
    def host_microseconds(self) -> float:
        """Wall time in which no kernel ran: planning, Python, launches."""
        return max(0.0, self.wall_microseconds - self.kernel_microseconds)

    @property
    def busy(self) -> float:
        """Fraction of the wall time in which a kernel ran."""
        return self.kernel_microseconds / self.wall_microseconds


class _Load(Protocol):
    """Requests that make every step of an engine the same."""

    tokens: int
    """Of each row in a step."""

    def run(self, steps: int) -> float:
        """Run so many steps; returns their seconds."""
        ...

    def starts(self) -> list[int]:
        """Tokens of each row before the next step."""
        ...


class Decodes:
    """Each of `rows` requests decodes a token a step; halfway through the profile, it is the last of `context`."""

    tokens = 1

    def __init__(self, engine: Engine, rows: int, context: int) -> None:
        longest = engine.max_model_len - _BEFORE
        if context > longest:
            raise InvalidArgument("context", context, f"at most {longest}, so that there is room for the steps")
        self.engine, self.rows, self.context = engine, rows, context
        length = max(1, context - _BEFORE)
        params = SamplingParams(max_tokens=engine.max_model_len, temperature=0, ignore_eos=True)
        # By row: what is longer begins with what is shorter, for a prefix cache to find.
        prompts = [_prompts(engine, random.Random(row), 1, length)[0] for row in range(rows)]
        self.lengths = {engine.add_request(prompt, params): length for prompt in prompts}
        while min(self.lengths.values()) == length:
            self._step()
        self.run(_WARM_UP)

    def end(self) -> None:
        """End the requests; the engine is free again."""
        for request_id in self.lengths:
            self.engine.abort(request_id)
        while self.engine.has_work:
            self.engine.step()

    def run(self, steps: int) -> float:
        """Run so many steps; returns their seconds."""
        _synchronize(self.engine.model.device)
        began = time.perf_counter()
        for _ in range(steps):
            self._step()
        _synchronize(self.engine.model.device)
        return time.perf_counter() - began

    def starts(self) -> list[int]:
        """Tokens of each row before the next step."""
        return [length - 1 for length in self.lengths.values()]  # the last is not in the cache yet

    def _step(self) -> None:
        for output in self.engine.step():
            if output.error is not None:
                raise output.error
            if output.finished:
                raise InvalidArgument("context", self.context, f"{self.rows} requests do not stay in step so long")
            self.lengths[output.request_id] += len(output.token_ids)
        stats = self.engine.stats()
        if stats.preemptions:
            raise InvalidArgument(
                "rows", self.rows, f"with {self.context} tokens each need more than {stats.blocks_total} KV blocks"
            )


class _Prefills:
    """Each step computes the whole prompt of a request that ends with it."""

    def __init__(self, engine: Engine, tokens: int) -> None:
        if tokens >= engine.max_model_len:
            raise InvalidArgument("prompt_tokens", tokens, f"at most {engine.max_model_len - 1}")
        self.engine, self.tokens, self.random = engine, tokens, random.Random(0)
        self.run(_WARM_UP)

    def run(self, steps: int) -> float:
        for prompt in _prompts(self.engine, self.random, steps, self.tokens):
            self.engine.add_request(prompt, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
        _synchronize(self.engine.model.device)
        began = time.perf_counter()
        while self.engine.has_work:
            for output in self.engine.step():
                if output.error is not None:
                    raise output.error
        _synchronize(self.engine.model.device)
        return time.perf_counter() - began

    def starts(self) -> list[int]:
        return [0]


def measure(
    config: EngineConfig, rows: int, context: int, prompt_tokens: int | None, trace: Path | None = None
) -> StepProfile:
    """Profile decodes of `rows` requests with `context` tokens each, or the prefill of one prompt.

    Writes a Chrome trace to `trace`. Raises `InvalidArgument` for steps that the engine cannot do.
    """
    if prompt_tokens is None and rows > config.max_num_seqs:
        raise InvalidArgument("rows", rows, f"at most max_num_seqs={config.max_num_seqs}")
    if prompt_tokens is not None and prompt_tokens > config.step_tokens:
        raise InvalidArgument("prompt_tokens", prompt_tokens, f"at most {config.step_tokens}, the tokens of one step")
    if prompt_tokens is not None and config.max_num_seqs > 1:
        raise InvalidArgument("max_num_seqs", config.max_num_seqs, "must be 1, so that a step prefills one prompt")
    copy_rate = copy_bandwidth(resolve_device(config.device))
    engine = make_engine(config)
    device = engine.model.device
    try:
        layers = [layer.spec for layer in probe(engine.model)]
        load: _Load = Decodes(engine, rows, context) if prompt_tokens is None else _Prefills(engine, prompt_tokens)
        if device.type == "cpu":  # where other processes may take time from one or the other step
            seconds = statistics.median(load.run(1) for _ in range(STEPS)) * STEPS
        else:
            seconds = load.run(STEPS)
        first = load.starts()
        activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        with _named_calls(device), _seconds_of(engine) as spent, profile(activities=[activity]) as profiler:
            load.run(STEPS)
        starts = [round((one + other) / 2) for one, other in zip(first, load.starts(), strict=True)]
        if trace is not None:
            profiler.export_chrome_trace(str(trace))
        times = _times(profiler, device)
        for kind, *_ in Seconds._fields_:
            if one := getattr(spent, kind):
                times[kind] += [one * 1e6 / STEPS] * STEPS
        model_bytes = _model_bytes(engine.model, layers, starts, load.tokens, "decode attention" in times)
    finally:
        engine.close()
    total = sum(map(sum, times.values()))
    kernels = []
    for kind, each in times.items():
        microseconds, moved = sum(each) / STEPS, model_bytes.get(kind)
        rate = None if moved is None or not microseconds else moved / microseconds / 1e3
        share, of_copy = sum(each) / total, None if rate is None else rate / copy_rate
        kernels.append(Kernels(kind, len(each) / STEPS, microseconds, share, moved, rate, of_copy))
    return StepProfile(
        rows=len(starts),
        tokens=load.tokens,
        context=statistics.mean(starts) + load.tokens,
        wall_microseconds=seconds / STEPS * 1e6,
        kernel_microseconds=total / STEPS,
        copy_gb_per_second=copy_rate,
        kernels=sorted(kernels, key=lambda kernel: -kernel.microseconds),
    )


@contextmanager
def _seconds_of(engine: Engine) -> Iterator[Seconds]:
    """What steps spend by kind where all their layers are one call."""
    fused, seconds = engine._paged_model.fused, Seconds()
    decoder = None if fused is None else fused.decoder
    if decoder is not None:
        decoder.seconds = seconds
    try:
        yield seconds
    finally:
        if decoder is not None:
            decoder.seconds = None


@contextmanager
def _named_calls(device: torch.device) -> Iterator[None]:
    """Calls of the compiled CPU kernels are events of the profiler, by their names."""
    # Loaded twice: load()'s cache tells these calls apart.
    asked = (library.load(), library.load(None)) if device.type == "cpu" else ()
    compiled = [one for one in asked if one is not None]
    called = [(one, name, each) for one in compiled for name, each in vars(one).items() if name.startswith("paged_")]

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with torch.profiler.record_function(name):
                return function(*arguments)

        return call

    for one, name, function in called:
        setattr(one, name, named(name, function))
    try:
        yield
    finally:
        for one, name, function in called:
            setattr(one, name, function)


def copy_bandwidth(device: torch.device) -> float:
    """GB/s read and written by copies of 1 GiB on a GPU, of 256 MiB on a CPU; the median of several."""
    source = torch.ones(1 << (30 if device.type == "cuda" else 28), dtype=torch.uint8, device=device)
    target, seconds, copies = torch.empty_like(source), [], 4
    for _ in range(5):
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        _synchronize(device)
        seconds.append((time.perf_counter() - began) / copies)
    rate = 2 * source.nbytes / statistics.median(seconds) / 1e9
    del source, target
    if device.type == "cuda":
        torch.cuda.empty_cache()  # an engine will want the memory
    return rate


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    return next(kind for kind, pattern in _KINDS if re.fullmatch(pattern, kernel, re.DOTALL))


def _times(profiler: Any, device: torch.device) -> dict[str, list[float]]:
    """Microseconds of each kernel by kind.

    A kernel launched before the one before it has ended, and waiting for it, counts from there: times add up.
    """
    times: dict[str, list[float]] = defaultdict(list)
    if device.type == "cpu":
        for event in profiler.events():
            if not event.name.startswith("paged_decoder"):  # whose parts are counted apart
                times[kind_of(event.name)].append(event.self_cpu_time_total)
        return times
    ended = -math.inf
    on_device = [event for event in profiler.events() if event.device_type.name == "CUDA"]
    for event in sorted(on_device, key=lambda event: event.time_range.start):
        start, end = event.time_range.start, event.time_range.end
        times[kind_of(event.name)].append(max(0.0, end - max(start, ended)))
        ended = max(ended, end)
    return times


def _model_bytes(
    model: PreTrainedModel, layers: list[LayerSpec], starts: list[int], count: int, decodes: bool
) -> dict[str, float]:
    """Bytes that the kernels of a step must read and write, by kind. Rows have `count` new tokens after `starts`.

    `decodes`: whether the decode kernel runs. In a prefill it attends in the last layer, for the token that samples;
    what the others save there counts only in attention.
    """
    config, size = model.config.get_text_config(), model.dtype.itemsize
    rows, tokens = len(starts), len(starts) * count
    head = model.get_output_embeddings()
    moved: dict[str, float] = {"linears": 0.0}
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            # All experts of a mixture.
            for weight in (weight for weight in module.parameters(recurse=False) if weight.dim() > 1):
                moved["linears"] += weight.nbytes + sum(weight.shape[-2:]) * (rows if module is head else tokens) * size
    attention = [_attended(layer, starts, count) * size for layer in layers]
    if count == 1:
        moved["decode attention"] = sum(attention)
    elif decodes:
        moved["prefill attention"] = sum(attention[:-1])
        moved["decode attention"] = _attended(layers[-1], [start + count - 1 for start in starts], 1) * size
    else:
        moved["prefill attention"] = sum(attention)
    moved["attention"] = sum(attention)
    # Two norms a layer and the last read what is added and the residual stream, and write that and the normed.
    moved["norms"] = 4 * config.hidden_size * size * (2 * len(layers) * tokens + rows)
    heads = [spec.num_heads * spec.key_dim + spec.num_kv_heads * (spec.key_dim + spec.value_dim) for spec in layers]
    moved["rope and cache"] = 2 * sum(heads) * tokens * size
    if isinstance(inner := getattr(config, "intermediate_size", None), int):
        moved["activation"] = 3 * inner * size * tokens * len(layers)
    moved["sampling"] = rows * config.vocab_size * size
    return moved


def _attended(layer: LayerSpec, starts: list[int], count: int) -> int:
    """Elements that attention of a layer reads and writes: K and V of tokens that any query sees, queries, outputs."""
    seen = 0
    for start in starts:
        first = 0 if layer.window is None else max(0, start + 1 - layer.window)
        if layer.chunk is not None:
            first = start // layer.chunk * layer.chunk
        seen += start + count - first
    return (seen * layer.num_kv_heads + len(starts) * count * layer.num_heads) * (layer.key_dim + layer.value_dim)


def _prompts(engine: Engine, r: random.Random, number: int, length: int) -> list[list[int]]:
    return [[r.randrange(engine.vocab_size) for _ in range(length)] for _ in range(number)]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
