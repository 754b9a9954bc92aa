"""`paged-backend simulate`. What is simulated with is imported when the command runs, so that `--help` is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

from paged_backend.bench.commands import settings_fields
from paged_backend.bench.result import check_writable
from paged_backend.config import EngineConfig
from paged_backend.errors import CheckedModel, InvalidArgument
from paged_backend.figures import require_matplotlib
from paged_backend.simulate.names import ALLOCATORS, PAGED, RESERVATIONS, SHAREGPT_OUTPUT, SHAREGPT_PROMPT
from paged_backend.simulate.shapes import DEVICES, MODELS, Device, ModelShape

if TYPE_CHECKING:
    from paged_backend.simulate.step_time import MeasuredSteps

Checked = TypeVar("Checked", bound=CheckedModel)
_TRACE, _GENERATED, _NOISY = "Trace from a file", "Generated trace (ShareGPT-like)", "Noisy neighbour"
_REPLICAS, _OUT = "Replicas", "Output"


def simulate_command(
    trace: Annotated[
        Path | None,
        typer.Option(help="CSV: ours (arrival,prompt,output,...), Azure's or BurstGPT's.", rich_help_panel=_TRACE),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="How many. Default: 10000, or all of the file.", rich_help_panel=_TRACE)
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests a second; 'inf': all at once. Default: 10, or as in the file.", rich_help_panel=_TRACE
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds repeat equal traces.", rich_help_panel=_GENERATED)] = 0,
    burstiness: Annotated[
        float,
        typer.Option(help="Shape of gamma arrivals: 1 is Poisson, less is burstier.", rich_help_panel=_GENERATED),
    ] = 1.0,
    mean_prompt: Annotated[float, typer.Option(help="Tokens.", rich_help_panel=_GENERATED)] = SHAREGPT_PROMPT,
    mean_output: Annotated[float, typer.Option(help="Tokens.", rich_help_panel=_GENERATED)] = SHAREGPT_OUTPUT,
    max_total: Annotated[
        int, typer.Option(help="Prompts and outputs are at most half of it.", rich_help_panel=_GENERATED)
    ] = 2048,
    tenants: Annotated[int, typer.Option(min=1, help="Tenants, equally active.", rich_help_panel=_GENERATED)] = 1,
    prefixes: Annotated[int, typer.Option(min=0, help="Shared prompt beginnings.", rich_help_panel=_GENERATED)] = 0,
    prefix_tokens: Annotated[int, typer.Option(min=0, help="Of each.", rich_help_panel=_GENERATED)] = 1024,
    noisy_requests: Annotated[
        int,
        typer.Option(min=0, help="Of one more tenant, 'noisy', all at once; also run without.", rich_help_panel=_NOISY),
    ] = 0,
    noisy_prompt: Annotated[int, typer.Option(min=1, help="Tokens of each.", rich_help_panel=_NOISY)] = 8192,
    noisy_output: Annotated[int, typer.Option(min=1, help="Tokens of each.", rich_help_panel=_NOISY)] = 128,
    noisy_at: Annotated[float, typer.Option(help="Seconds.", rich_help_panel=_NOISY)] = 0.0,
    model: Annotated[
        str,
        typer.Option(help=f"One of {', '.join(MODELS)}, or a JSON file of a ModelShape.", rich_help_panel=_REPLICAS),
    ] = "8b",
    device: Annotated[
        str, typer.Option(help=f"One of {', '.join(DEVICES)}, or a JSON file of a Device.", rich_help_panel=_REPLICAS)
    ] = "h100",
    step_time: Annotated[
        Path | None,
        typer.Option(
            help="Instead of the roofline: JSON of a, b, c, d (seconds = a + b*prefill_tokens + c*decode_rows + "
            "d*kv_tokens), or CSV of measured steps to fit them to.",
            rich_help_panel=_REPLICAS,
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(help="1 to 10000.", rich_help_panel=_REPLICAS)] = 1,
    router: Annotated[
        str,
        typer.Option(help="round-robin, least-loaded, prefix-affinity or a plugin's.", rich_help_panel=_REPLICAS),
    ] = "round-robin",
    scheduling_policy: Annotated[
        list[str] | None,
        typer.Option(
            help="fcfs, priority, shortest-remaining, fair-share or a plugin's; given again, they are compared. "
            "Default: fcfs.",
            rich_help_panel=_REPLICAS,
        ),
    ] = None,
    reserve: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(RESERVATIONS)}; given again, they are compared. Default: paged.",
            rich_help_panel=_REPLICAS,
        ),
    ] = None,
    allocator: Annotated[
        str,
        typer.Option(help=f"{' or '.join(ALLOCATORS)}, of what is not paged.", rich_help_panel=_REPLICAS),
    ] = "buddy",
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Another EngineConfig field; again for more.", rich_help_panel=_REPLICAS
        ),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Every request.", rich_help_panel=_OUT)] = None,
    png: Annotated[
        Path | None, typer.Option(help="Latency and load; of several --reserve, the memory.", rich_help_panel=_OUT)
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="The figures.", rich_help_panel=_OUT)] = None,
    save_trace: Annotated[Path | None, typer.Option(help="The trace, as CSV.", rich_help_panel=_OUT)] = None,
) -> None:
    """Run the real scheduler and block accounting against a model of step time: throughput, latency, memory.

    No device is needed, and a million requests take minutes.
    """
    for name, path in (("csv", csv), ("png", png), ("json", output), ("save_trace", save_trace)):
        check_writable(name, path)
    if rate is not None and not rate > 0:
        raise InvalidArgument("rate", rate, "must be more than 0")
    fields = settings_fields(setting or [], ("model", "device", "scheduling_policy"))
    policies = dict.fromkeys(scheduling_policy or ["fcfs"])
    configs = [EngineConfig(**fields | {"scheduling_policy": policy}) for policy in policies]
    shape = _named("model", model, MODELS, ModelShape)
    machine = _named("device", device, DEVICES, Device)

    from paged_backend.simulate import plots
    from paged_backend.simulate.comparison import Comparison
    from paged_backend.simulate.report import table, write_csv
    from paged_backend.simulate.setup import Setup
    from paged_backend.simulate.trace import burst, generate
    from paged_backend.simulate.trace_csv import read_trace, write_trace

    if png is not None:
        require_matplotlib("png")
    measured = None if step_time is None else _measured(step_time)
    modes = dict.fromkeys(reserve or [PAGED])
    setups = [Setup(config, shape, machine, mode, allocator, measured) for config in configs for mode in modes]
    if trace is None:
        arrivals = generate(
            requests or 10_000,
            10.0 if rate is None else rate,
            seed,
            burstiness=burstiness,
            mean_prompt=mean_prompt,
            mean_output=mean_output,
            max_total=max_total,
            tenants=tenants,
            prefixes=prefixes,
            prefix_tokens=prefix_tokens if prefixes else 0,
        )
    else:
        arrivals = read_trace(trace)
        arrivals = arrivals if requests is None else arrivals.first(requests)
        arrivals = arrivals if rate is None else arrivals.at_rate(rate)
    quiet = None
    if noisy_requests:
        quiet = arrivals
        arrivals = arrivals.and_also(burst(noisy_requests, noisy_prompt, noisy_output, noisy_at))
    if save_trace is not None:
        write_trace(arrivals, save_trace)

    compared = Comparison(arrivals, setups, replicas, router, quiet)
    compared.run()
    if csv is not None:
        write_csv(compared.runs, compared.reports, csv)
    if output is not None:
        noise = {"requests": noisy_requests, "prompt": noisy_prompt, "output": noisy_output, "at_seconds": noisy_at}
        asked = {"seed": seed if trace is None else None, "noise": noise if noisy_requests else None}
        output.write_text(json.dumps(asked | compared.document(), indent=2) + "\n")
    if png is not None:
        plots.write_png(compared.runs, compared.reports, compared.title, png)
    Console().print(table(compared.reports))
    for label, ratio in compared.ratios.items():
        Console().print(f"{label}: p99 TTFT of the others is {ratio:,.2f} times that without noise", highlight=False)


def _named(field: str, value: str, known: dict[str, Checked], kind: type[Checked]) -> Checked:
    if value in known:
        return known[value]
    path = Path(value)
    if not path.is_file():
        raise InvalidArgument(field, value, f"must be one of {', '.join(known)}, or a JSON file of a {kind.__name__}")
    return kind(**_json_object(field, path))


def _measured(path: Path) -> MeasuredSteps:
    from paged_backend.simulate.step_time import MeasuredSteps, fit

    return fit(path) if path.suffix.lower() == ".csv" else MeasuredSteps(**_json_object("step_time", path))


def _json_object(field: str, path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(field, str(path), f"cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidArgument(field, str(path), "must hold a JSON object")
    return found
