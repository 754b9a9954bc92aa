"""`paged-backend bench ...`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from paged_backend.bench import shapes, workloads
from paged_backend.bench.result import ThroughputResult, check_writable
from paged_backend.errors import InvalidArgument
from paged_backend.figures import require_matplotlib
from paged_backend.files import write_json
from paged_backend.request import SamplingParams

if TYPE_CHECKING:
    from paged_backend.bench.peers import PeersResult
    from paged_backend.bench.step import StepProfile

app = typer.Typer(help="Measure speed, and accuracy.", no_args_is_help=True)

Model = Annotated[
    str,
    typer.Option(help=f"Local directory, hub id, known name, or one of {', '.join(shapes.SHAPES)} (random weights)."),
]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda[:index].")]
Output = Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Another EngineConfig field; may be given again."),
]


@app.command()
def throughput(
    workload: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(workloads.NAMES)}; may be given again. Default: batch32."),
    ] = None,
    model: Model = "smollm2-135m-instruct",
    dtype: DType = "bfloat16",
    device: Device = "auto",
    peer: Annotated[str, typer.Option(help="hf (transformers' generate) or none.")] = "hf",
    batch_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Batch size for the peer to try; may be given again. Default: all, half."),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each system, in turns.")] = 3,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens whose probabilities sum to this.")] = 1.0,
    setting: Setting = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the result to this JSON file; of several workloads, a list.")
    ] = None,
) -> None:
    """Compare tokens per second of the engine with a peer on fixed workloads, one after the other."""
    sampling = SamplingParams(temperature=temperature, top_p=top_p)
    chosen = [
        dataclasses.replace(workloads.workload(name), temperature=sampling.temperature, top_p=top_p)
        for name in workload or ["batch32"]
    ]
    if peer not in ("hf", "none"):
        raise InvalidArgument("peer", peer, "must be hf or none")
    check_writable("output", output)
    fields = settings_fields(setting or [], ("model", "dtype", "device"))
    if peer == "hf":
        fields.setdefault("gpu_memory_utilization", 0.5)  # both are on the GPU at once

    # Only now torch: a bad argument is told at once.
    from paged_backend import models
    from paged_backend.bench.hf_peer import HfPeer
    from paged_backend.bench.throughput import OurEngine, System, compare
    from paged_backend.config import EngineConfig

    console = Console(stderr=True)
    with ExitStack() as stack:
        config = EngineConfig(**{"model": model, "dtype": dtype, "device": device} | fields)
        ours = config
        if model not in shapes.SHAPES or peer == "hf":
            if model in shapes.SHAPES:
                path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{model}-")))
                console.print(f"making {model}", style="dim")
                shapes.save_random(model, path)
            else:
                path = models.resolve(model, config.revision)
            ours = config.model_copy(update={"model": str(path), "revision": None})
        console.print("loading the engine", style="dim")
        systems: list[System] = [OurEngine(ours)]
        if peer == "hf":
            console.print("loading the peer", style="dim")
            systems.append(HfPeer(path, dtype, device, batch_size or []))
        results: list[ThroughputResult] = []
        for each in chosen:
            console.print(each.name, style="dim")
            results.append(compare(config, each, systems, repeat, lambda line: console.print(line, style="dim")))
            if output is not None:  # now: the next one may fail
                documents = [result.document() for result in results]
                write_json(output, documents if len(chosen) > 1 else documents[0])
    _show(results)


def settings_fields(settings: list[str], options: Sequence[str]) -> dict[str, object]:
    """EngineConfig fields of `--set NAME=VALUE`, as text. Raises `InvalidArgument` for those with an option."""
    fields: dict[str, object] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise InvalidArgument("set", setting, "must be NAME=VALUE")
        if name in options:
            raise InvalidArgument("set", setting, f"use --{name.replace('_', '-')}")
        fields[name] = value
    return fields


def _show(results: list[ThroughputResult]) -> None:
    first = results[0]
    sampling = f", temperature {first.temperature:g}, top_p {first.top_p:g}" if first.temperature else ""
    anchor = next((result.anchor for result in results if result.anchor is not None), None)
    runs = [f"run {turn + 1}" for turn in range(len(first.series[0].seconds))]
    columns = ["workload", "unit", "system", *runs, "median", "ratio", "load s"]
    if anchor is not None:
        columns += [anchor.system, "ratio to it"]
    table = Table(title=f"{first.model}, {first.dtype}{sampling}")
    for name in columns:
        table.add_column(name, justify="left" if name in ("workload", "unit", "system") else "right")
    for result in results:
        for series in result.series:
            rates = [f"{rate:,.1f}" for rate in series.rates]
            median = _rate(series.median_rate, 1, result)
            cells = [*rates, median, f"{result.ratio(series):.2f}x", f"{series.load_seconds:.1f}"]
            if result.anchor is not None:
                low, high = result.anchor.lowest, result.anchor.highest
                shown = f"{low:,.0f}-{high:,.0f}" if low < high else _rate(high, 0, result)
                cells += [shown, f"{series.median_rate / high:.2f}x"]
            table.add_row(result.workload, result.unit, series.system, *cells)
        table.add_section()
    Console().print(table)


def _rate(rate: float, digits: int, result: ThroughputResult) -> str:
    """Tokens per second, of a lone request also as the time of a token."""
    return f"{rate:,.{digits}f}" + (f" ({1000 / rate:.2f} ms/token)" if result.num_requests == 1 else "")


@app.command()
def peers(
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(workloads.NAMES)}; may be given again. Default: {', '.join(workloads.CPU_SET)}."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Local directory, hub id or known name.")] = "smollm2-135m-instruct",
    dtype: DType = "bfloat16",
    peer: Annotated[
        list[str] | None, typer.Option(help="vllm or transformers; may be given again. Default: both.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of each system, on as many cores. Default: all cores.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each system, in turns.")] = 5,
    setting: Setting = None,
    output: Output = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the result into this PNG file.")] = None,
) -> None:
    """Compare with vLLM and transformers' generate on the CPU: each in its own process, all on the same cores in turns.

    vLLM's CPU build has an environment of its own, which `make peers` makes in a checkout.
    """
    from paged_backend import models
    from paged_backend.bench import plots
    from paged_backend.bench.peers import PEERS, check_peers, compare
    from paged_backend.config import EngineConfig

    chosen = [workloads.workload(name) for name in workload or workloads.CPU_SET]
    others = list(dict.fromkeys(peer or PEERS))
    check_peers(others)
    check_writable("output", output)
    check_writable("plot", plot)
    if plot is not None:
        require_matplotlib("plot")
    fields = settings_fields(setting or [], ("model", "dtype", "device"))
    config = EngineConfig(**{"model": model, "dtype": dtype, "device": "cpu"} | fields)
    path = models.resolve(model, config.revision)
    config = config.model_copy(update={"model": str(path), "revision": None})
    console = Console(stderr=True)

    def keep(result: PeersResult) -> None:  # now: the next workload may fail
        if output is not None:
            write_json(output, result.document())
        if plot is not None:
            plots.write_peers(result, plot)

    result = compare(config, chosen, others, threads, repeat, lambda line: console.print(line, style="dim"), keep)
    _show_peers(result)


def _show_peers(result: PeersResult) -> None:
    ours, *others = result.ready_seconds
    runs = [f"run {turn + 1}" for turn in range(len(result.contests[0].series[0].seconds))]
    table = Table(title=f"{result.model}, {result.dtype}, {result.threads} threads", caption_justify="left")
    for name in ("workload", "unit", "system", *runs, "median", f"{ours} is", "ready s"):
        table.add_column(name, justify="left" if name in ("workload", "unit", "system") else "right")
    for contest in result.contests:
        for series in contest.series:
            rates = [f"{rate:,.1f}" for rate in series.rates]
            ratio = f"{contest.ratios[series.system]:.2f}x" if series.system in others else ""
            ready = f"{result.ready_seconds[series.system]:.1f}"
            table.add_row(
                contest.workload, contest.unit, series.system, *rates, f"{series.median_rate:,.1f}", ratio, ready
            )
        table.add_section()
    elsewhere = max(cores for contest in result.contests for cores in contest.other_cores.values())
    table.caption = f"the rest of the machine kept up to {elsewhere:.2f} cores busy during runs"
    Console().print(table)


@app.command()
def step(
    rows: Annotated[int | None, typer.Option(min=1, max=65536, help="Requests that decode. Default: 1.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of each before. Default: 512.")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=2, help="Instead of decodes, the prefill of one prompt of so many tokens.")
    ] = None,
    model: Model = "smollm2-135m-instruct",
    dtype: DType = "bfloat16",
    device: Device = "auto",
    profile: Annotated[Path | None, typer.Option(help="Write a Chrome trace of the steps to this file.")] = None,
    setting: Setting = None,
    output: Output = None,
) -> None:
    """Show where the time of one step goes: its kernels, beside the bytes they must move and what a copy reaches."""
    if prompt_tokens is not None and (rows, context) != (None, None):
        raise InvalidArgument("prompt_tokens", prompt_tokens, "is a step without rows and context")
    check_writable("output", output)
    check_writable("profile", profile)
    fields = settings_fields(setting or [], ("model", "dtype", "device"))
    rows = rows or 1
    defaults: dict[str, object] = {"enable_prefix_caching": False, "optimize_for": "throughput"}
    defaults["max_num_seqs"] = max(rows, 256)
    if prompt_tokens is not None:  # alone in a step, and whole
        defaults |= {"max_num_seqs": 1, "max_num_batched_tokens": prompt_tokens}
    from paged_backend import models
    from paged_backend.bench import machine
    from paged_backend.bench.step import measure
    from paged_backend.config import EngineConfig

    config = EngineConfig(**{"model": model, "dtype": dtype, "device": device} | defaults | fields)
    if model not in shapes.SHAPES:
        path = models.resolve(model, config.revision)
        config = config.model_copy(update={"model": str(path), "revision": None})
    found = measure(config, rows, context or 512, prompt_tokens, profile)
    if output is not None:
        document = {
            "machine": dataclasses.asdict(machine.describe()),
            "model": Path(model).name,
            "settings": config.model_dump(exclude_defaults=True, exclude={"model"}),
            "step": dataclasses.asdict(found) | {"busy": found.busy, "host_microseconds": found.host_microseconds},
        }
        write_json(output, document)
    _show_step(Path(model).name, found)


def _show_step(model: str, found: StepProfile) -> None:
    title = f"{model}: {found.rows} x {found.tokens} tokens, context {found.context:,.0f}"
    table = Table(title=title, caption_justify="left")
    table.caption = (
        f"wall {found.wall_microseconds:,.0f} us a step, kernels {found.kernel_microseconds:,.0f} us "
        f"({found.busy:.0%}), the host alone {found.host_microseconds:,.0f} us; "
        f"a copy moves {found.copy_gb_per_second:,.0f} GB/s"
    )
    for name in ("kernels", "calls", "us", "share", "model MB", "GB/s", "of copy"):
        table.add_column(name, justify="left" if name == "kernels" else "right")
    for each in found.kernels:
        cells = [each.kind, f"{each.calls:,.1f}", f"{each.microseconds:,.1f}", f"{each.share:.1%}"]
        if each.model_bytes is None or each.gb_per_second is None or each.of_copy is None:
            cells += ["-"] * 3
        else:
            cells += [f"{each.model_bytes / 1e6:,.2f}", f"{each.gb_per_second:,.0f}", f"{each.of_copy:.0%}"]
        table.add_row(*cells)
    Console().print(table)


@app.command()
def scaling(
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="May be given again. Default: from 1 to all cores, doubling.")
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Requests that decode; may be given again. Default: 1, 2, 4, ..., 128."),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(min=64, help="Tokens of each; may be given again. Default: 160, 512, 2048, 8000."),
    ] = None,
    model: Model = "smollm2-135m-instruct",
    dtype: DType = "bfloat16",
    setting: Setting = None,
    output: Output = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the result into this PNG file.")] = None,
) -> None:
    """Measure steps of decodes on the CPU by threads, rows and context; points of too many tokens are left out."""
    check_writable("output", output)
    check_writable("plot", plot)
    if plot is not None:
        require_matplotlib("plot")
    fields = settings_fields(setting or [], ("model", "dtype", "device"))
    from paged_backend import models
    from paged_backend.bench import machine, plots
    from paged_backend.bench.scaling import MOST_TOKENS, grid, measure
    from paged_backend.config import EngineConfig

    here = machine.describe()
    counts = sorted(set(threads or [*(1 << power for power in range(here.cores.bit_length() - 1)), here.cores]))
    if counts[-1] > here.cores:
        raise InvalidArgument("threads", counts[-1], f"at most {here.cores}, the cores of this process")
    points = grid(rows or [1 << power for power in range(8)], context or [160, 512, 2048, 8000])
    if not points:
        raise InvalidArgument("rows", rows, f"at most {MOST_TOKENS} tokens in all rows")
    defaults: dict[str, object] = {"max_num_seqs": max(count for count, _ in points), "optimize_for": "throughput"}
    config = EngineConfig(**{"model": model, "dtype": dtype, "device": "cpu"} | defaults | fields)
    if model not in shapes.SHAPES:
        path = models.resolve(model, config.revision)
        config = config.model_copy(update={"model": str(path), "revision": None})
    console = Console(stderr=True)
    found = measure(config, counts, points, lambda line: console.print(line, style="dim"))
    if output is not None:
        document = {
            "machine": dataclasses.asdict(here),
            "model": Path(model).name,
            "settings": config.model_dump(exclude_defaults=True, exclude={"model"}),
            "points": [dataclasses.asdict(each) | {"tokens_per_second": each.tokens_per_second} for each in found],
        }
        write_json(output, document)
    if plot is not None:
        plots.write_scaling(found, f"{Path(model).name}, {dtype}, {here.cpu}", plot)
    table = Table("threads", "rows", "context", "ms a step", "tok/s", title=f"{Path(model).name}, {dtype}")
    for each in sorted(found, key=lambda each: (each.threads, each.context, each.rows)):
        cells = (f"{each.context:,.0f}", f"{each.step_milliseconds:,.1f}", f"{each.tokens_per_second:,.1f}")
        table.add_row(str(each.threads), str(each.rows), *cells)
    Console().print(table)


@app.command()
def start(
    model: Model = "smollm2-135m-instruct",
    dtype: DType = "bfloat16",
    device: Device = "auto",
    repeat: Annotated[int, typer.Option(min=1, help="Cold and warm starts.")] = 1,
    setting: Setting = None,
    output: Output = None,
) -> None:
    """Measure the seconds from the start of a process until its engine is ready, with empty caches and then again."""
    check_writable("output", output)
    fields = settings_fields(setting or [], ("model", "dtype", "device"))
    from paged_backend import models
    from paged_backend.bench import machine
    from paged_backend.bench.start import measure
    from paged_backend.config import EngineConfig

    config = EngineConfig(**{"model": model, "dtype": dtype, "device": device} | fields)
    with tempfile.TemporaryDirectory(prefix=f"{Path(model).name}-") as folder:
        if model in shapes.SHAPES:
            path = Path(folder, model)
            shapes.save_random(model, path)
        else:
            path = models.resolve(model, config.revision)
        starts = measure(config.model_copy(update={"model": str(path), "revision": None}), repeat)
    stages = [f"{name} s" for name in starts[0].stages]
    table = Table("start", "imported s", *stages, "ready s", "first token s", title=f"{Path(model).name}, {dtype}")
    for each in starts:
        marks = (each.imported, *each.stages.values(), each.ready, each.first_token)
        table.add_row(each.kind, *(f"{seconds:.1f}" for seconds in marks))
    if output is not None:
        document = {
            "machine": dataclasses.asdict(machine.describe()),
            "model": Path(model).name,
            "settings": config.model_dump(exclude_defaults=True, exclude={"model"}),
            "starts": [dataclasses.asdict(each) for each in starts],
        }
        write_json(output, document)
    Console().print(table)


@app.command()
def accuracy(
    model: Annotated[str, typer.Option(help="Local directory, hub id or known name.")] = "smollm2-135m-instruct",
    setting: Setting = None,
    output: Output = None,
) -> None:
    """Measure what bfloat16 and int8 change of the log-probabilities of a fixed text, on the CPU."""
    check_writable("output", output)
    fields = {"device": "cpu"} | settings_fields(setting or [], ("model", "dtype", "quantization"))
    from paged_backend import models
    from paged_backend.bench import machine
    from paged_backend.bench.accuracy import measure

    found = measure(str(models.resolve(model)), fields)
    names = ("tokens", "mean logprob", "difference", "mean deviation", "same likeliest")
    table = Table("format", *names, title=f"{Path(model).name}, against {found[0].dtype}")
    for each in found:
        name = f"{each.dtype} {each.quantization}" if each.quantization else each.dtype
        means = f"{each.mean_logprob:.4f}", f"{each.difference:+.4f}", f"{each.mean_deviation:.4f}"
        table.add_row(name, str(each.tokens), *means, f"{each.same_likeliest:.1%}")
    if output is not None:
        document = {
            "machine": dataclasses.asdict(machine.describe()),
            "model": Path(model).name,
            "settings": {name: str(value) for name, value in fields.items()},
            "formats": [dataclasses.asdict(each) for each in found],
        }
        write_json(output, document)
    Console().print(table)


@app.command()
def planning(
    running: Annotated[
        list[int] | None,
        typer.Option(min=1, max=65536, help="Running requests; may be given again. Default: 16, 64, 256, 1024."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to time.")] = 1000,
    output: Output = None,
) -> None:
    """Measure the host time of planning a step, by the number of running requests."""
    check_writable("output", output)
    from paged_backend.bench import machine
    from paged_backend.bench.planning import measure

    table = Table("running", "plan median us", "us a request", "p99 us", "mean us", "commit median us")
    costs = [measure(count, steps) for count in running or (16, 64, 256, 1024)]
    for cost in costs:
        figures = (cost.plan_median_us, cost.plan_median_us / cost.running, cost.plan_p99_us, cost.plan_mean_us)
        table.add_row(str(cost.running), *(f"{value:.2f}" for value in figures), f"{cost.commit_median_us:.1f}")
    if output is not None:
        machine_now = dataclasses.asdict(machine.describe())
        write_json(output, {"machine": machine_now, "costs": [dataclasses.asdict(cost) for cost in costs]})
    Console().print(table)


@app.command()
def guided(
    model: Annotated[str, typer.Option(help="Local directory, hub id or known name.")] = "smollm2-135m-instruct",
    rows: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests at once; may be given again. Default: 1, 16.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens of each.")] = 64,
    repeat: Annotated[int, typer.Option(min=1, help="Times to measure each.")] = 5,
    setting: Setting = None,
    output: Output = None,
) -> None:
    """Measure what structured outputs cost: compiling schemas, masks, and steps with and without them."""
    check_writable("output", output)
    fields = settings_fields(setting or [], ("model",))
    from paged_backend import models
    from paged_backend.bench import machine
    from paged_backend.bench.guided import measure_schemas, measure_steps
    from paged_backend.config import EngineConfig
    from paged_backend.engine import Engine

    engine = Engine(EngineConfig(**{"model": str(models.resolve(model))} | fields))
    assert engine.tokenizer is not None
    schemas = Table("schema", "size", "compile ms", "again ms", "mask median us", "mean us", "p99 us", "accept us")
    costs = measure_schemas(engine.tokenizer, engine.vocab_size, repeat)
    for cost in costs:
        name, characters, *figures = dataclasses.astuple(cost)
        schemas.add_row(name, str(characters), *(f"{value:.2f}" for value in figures))
    steps = {count: measure_steps(engine, count, tokens, repeat) for count in rows or (1, 16)}
    table = Table("requests", "free ms a step", "guided ms a step", "ratio")
    for count, (free, held) in steps.items():
        table.add_row(str(count), f"{free:.2f}", f"{held:.2f}", f"{held / free:.2f}x")
    if output is not None:
        machine_now = dataclasses.asdict(machine.describe())
        document = {"machine": machine_now, "model": model, "schemas": [dataclasses.asdict(cost) for cost in costs]}
        write_json(output, document | {"steps": [{"rows": count, "ms": ms} for count, ms in steps.items()]})
    for shown in (schemas, table):
        Console().print(shown)


@app.command()
def neighbour(
    model: Annotated[str, typer.Option(help="Local directory, hub id or known name.")] = "smollm2-135m-instruct",
    policy: Annotated[str, typer.Option(help="Scheduling policy beside the noisy tenant.")] = "fair-share",
    noisy_requests: Annotated[int, typer.Option(min=1, help="Requests of the noisy tenant, all at the start.")] = 1000,
    quiet_requests: Annotated[int, typer.Option(min=1, help="Requests of the quiet tenant.")] = 50,
    interval: Annotated[float, typer.Option(min=0, help="Seconds between the quiet tenant's requests.")] = 3.0,
    setting: Setting = None,
    output: Output = None,
) -> None:
    """Measure a quiet tenant's time to first token without, then with a noisy one beside it."""
    check_writable("output", output)
    fields = settings_fields(setting or [], ("model", "scheduling_policy"))
    from paged_backend import models
    from paged_backend.bench import machine
    from paged_backend.bench.neighbour import Load, measure
    from paged_backend.config import EngineConfig

    fields = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "scheduling_policy": policy} | fields
    config = EngineConfig(**{"model": str(models.resolve(model)), "dtype": "bfloat16"} | fields)
    load = Load(quiet_requests=quiet_requests, quiet_interval=interval, noisy_requests=noisy_requests)
    waits = [measure(config, dataclasses.replace(load, noisy_requests=count)) for count in (0, noisy_requests)]
    table = Table("noisy requests", "policy", "p50 s", "p99 s", "ratio of p99")
    for wait in waits:
        ratio = f"{wait.p99 / waits[0].p99:.2f}x"
        table.add_row(str(wait.noisy_requests), wait.policy, f"{wait.p50:.3f}", f"{wait.p99:.3f}", ratio)
    if output is not None:
        document = {
            "machine": dataclasses.asdict(machine.describe()),
            "model": model,
            "settings": {name: str(value) for name, value in fields.items()},
            "load": dataclasses.asdict(load),
            "waits": [dataclasses.asdict(wait) for wait in waits],
        }
        write_json(output, document)
    Console().print(table)
