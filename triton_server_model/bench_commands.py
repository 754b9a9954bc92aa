"""`paged-backend bench serving` and `bench cancel`."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from paged_backend.bench.commands import Device, DType, Model, Output, Setting, settings_fields
from paged_backend.bench.result import check_writable
from paged_backend.files import write_json

if TYPE_CHECKING:
    from paged_backend.config import EngineConfig
    from triton_server_model.bench import Point


def serving(
    streams: Annotated[
        list[int] | None,
        typer.Option(min=1, max=4096, help="Streams at once; may be given again. Default: 1, 16, 64, 256."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 128,
    repeat: Annotated[int, typer.Option(min=1, help="Timed runs of each; the median counts.")] = 3,
    model: Model = "smollm2-135m-instruct",
    dtype: DType = "bfloat16",
    device: Device = "auto",
    setting: Setting = None,
    output: Output = None,
) -> None:
    """Compare tokens per second that reach clients of a real tritonserver with those of the engine alone."""
    check_writable("output", output)
    fields = settings_fields(setting or [], ("model", "dtype", "device"))
    from paged_backend.config import EngineConfig
    from triton_server_model.bench import countable, measure

    console = Console(stderr=True)
    config = EngineConfig(**{"model": model, "dtype": dtype, "device": device} | fields)
    with countable(config) as (ours, vocab_size):
        points = measure(
            ours,
            vocab_size,
            streams or (1, 16, 64, 256),
            prompt_tokens,
            output_tokens,
            repeat,
            lambda line: console.print(line, style="dim", highlight=False),
        )
    if output is not None:
        document = {
            **_setting(config, model),
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
            "repeat": repeat,
            "points": [point.document() for point in points],
        }
        write_json(output, document)
    _show(f"{Path(model).name}, {dtype}: {prompt_tokens} + {output_tokens} tokens a stream", points)


def cancel(
    model: Model = "smollm2-135m-instruct",
    dtype: DType = "bfloat16",
    device: Device = "auto",
    repeat: Annotated[int, typer.Option(min=1, help="Requests to cancel.")] = 20,
    setting: Setting = None,
    output: Output = None,
) -> None:
    """Measure how soon after a client of tritonserver cancels a request another one has its place and blocks."""
    check_writable("output", output)
    fields = settings_fields(setting or [], ("model", "dtype", "device"))
    from paged_backend.config import EngineConfig
    from triton_server_model.bench import countable, measure_cancel

    config = EngineConfig(**{"model": model, "dtype": dtype, "device": device} | fields)
    with countable(config) as (ours, vocab_size):
        taken = sorted(round(1e3 * seconds, 2) for seconds in measure_cancel(ours, vocab_size, repeat))
    if output is not None:
        write_json(output, {**_setting(config, model), "milliseconds": taken})
    typer.echo(f"from cancelled to freed: median {statistics.median(taken):.1f} ms, at most {taken[-1]:.1f} ms")


def _setting(config: EngineConfig, model: str) -> dict[str, object]:
    """What a result was measured with."""
    from paged_backend.bench import machine

    return {
        "machine": dataclasses.asdict(machine.describe()),
        "model": Path(model).name,
        "settings": config.model_dump(exclude_defaults=True, exclude={"model"}),
    }


def _show(title: str, points: list[Point]) -> None:
    table = Table(title=title, box=None)
    times = ("TTFT ms\np50", "\np99", "\nqueue", "\nprefill", "ms a\ntoken", "tokens\nat once")
    for name in ("\nstreams", "Triton\ntok/s", "engine\ntok/s", "\nshare", *times):
        table.add_column(name, justify="right")
    for point in points:
        table.add_row(
            str(point.streams),
            f"{point.tokens_per_second:,.1f}",
            f"{point.engine_tokens_per_second:,.1f}",
            f"{point.share:.1%}",
            f"{point.ttft_p50_ms:,.1f}",
            f"{point.ttft_p99_ms:,.1f}",
            f"{point.queue_ms:,.1f}",
            f"{point.prefill_ms:,.1f}",
            f"{point.inter_token_p50_ms:,.2f}",
            f"{point.tokens_per_response:.2f}",
        )
    Console().print(table)
