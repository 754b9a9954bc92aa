"""`paged-backend bench ...`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from paged_backend.bench import shapes, workloads
from paged_backend.bench.result import ThroughputResult
from paged_backend.errors import InvalidArgument

app = typer.Typer(help="Measure speed.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    # With a callback typer keeps `throughput` a command of the group even while it is the only one.
    pass


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
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another EngineConfig field; may be given again."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
) -> None:
    """Compare tokens per second of the engine with a peer on a fixed workload."""
    chosen = workloads.workload(workload)
    if peer not in ("hf", "none"):
        raise InvalidArgument("peer", peer, "must be hf or none")
    if output is not None and not output.absolute().parent.is_dir():
        raise InvalidArgument("output", str(output), "its directory does not exist")
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
