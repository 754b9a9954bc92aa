"""`paged-backend bench ...`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from paged_backend.bench import shapes, workloads
from paged_backend.bench.result import ThroughputResult, check_writable, write_json
from paged_backend.errors import InvalidArgument

app = typer.Typer(help="Measure speed.", no_args_is_help=True)

Output = Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")]
Setting = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Another EngineConfig field; may be given again."),
]


@app.command()
def throughput(
    workload: Annotated[str, typer.Option(help=f"One of {', '.join(workloads.NAMES)}.")] = "batch32",
    model: Annotated[
        str,
        typer.Option(help=f"Local directory, hub id, known name, or one of {', '.join(shapes.SHAPES)}."),
    ] = "smollm2-135m-instruct",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:index].")] = "auto",
    peer: Annotated[str, typer.Option(help="hf (transformers' generate) or none.")] = "hf",
    batch_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Batch size for the peer to try; may be given again. Default: all, half."),
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each system, in turns.")] = 3,
    setting: Setting = None,
    output: Output = None,
) -> None:
    """Compare tokens per second of the engine with a peer on a fixed workload."""
    chosen = workloads.workload(workload)
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
        if model in shapes.SHAPES:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"{model}-")))
            console.print(f"making {model}", style="dim")
            shapes.save_random(model, path)
        else:
            path = models.resolve(model, config.revision)
        console.print("loading the engine", style="dim")
        systems: list[System] = [OurEngine(config.model_copy(update={"model": str(path), "revision": None}))]
        if peer == "hf":
            console.print("loading the peer", style="dim")
            systems.append(HfPeer(path, dtype, device, batch_size or []))
        result = compare(config, chosen, systems, repeat, lambda line: console.print(line, style="dim"))
    if output is not None:
        result.write(output)
    _show(result)


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


def _show(result: ThroughputResult) -> None:
    table = Table(title=f"{result.workload}, {result.model}, {result.dtype}: {result.unit}")
    table.add_column("system")
    for turn in range(len(result.series[0].seconds)):
        table.add_column(f"run {turn + 1}", justify="right")
    table.add_column("median", justify="right")
    table.add_column("ratio", justify="right")
    table.add_column("load s", justify="right")
    for series in result.series:
        rates = [f"{rate:,.1f}" for rate in [*series.rates, series.median_rate]]
        ratio = f"{result.ratio(series):.2f}x"
        table.add_row(series.system, *rates, ratio, f"{series.load_seconds:.1f}")
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
