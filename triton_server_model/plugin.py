"""Adds `serve`, `install-backend`, `top`, `bench serving` and `bench cancel` to the `paged-backend` command line.

Imported at every start of it, so heavy imports are inside.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paged_backend.errors import InvalidArgument
from paged_backend.plugins import hookimpl

if TYPE_CHECKING:
    from rich.console import Console

    from triton_server_model.launcher import TritonServer
    from triton_server_model.openai.server import OpenAIServer


@hookimpl
def paged_cli_commands(app: typer.Typer) -> None:
    """Add `paged-backend` commands `serve`, `install-backend`, `top`, `bench serving` and `bench cancel`."""
    from paged_backend.bench import commands as bench
    from triton_server_model.bench_commands import cancel, serving

    app.command()(serve)
    app.command()(install_backend)
    app.command()(top)
    bench.app.command()(serving)
    bench.app.command()(cancel)


Port = typer.Option(min=1, max=65535)


def serve(
    model: Annotated[
        str | None, typer.Option(help="Local directory, hub id, or a name of `paged-backend models list`.")
    ] = None,
    repository: Annotated[
        Path | None,
        typer.Option(help="Serve this Triton model repository instead of --model.", exists=True, file_okay=False),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    http_port: Annotated[int, Port] = 8000,
    grpc_port: Annotated[int, Port] = 8001,
    metrics_port: Annotated[int, Port] = 8002,
    openai: Annotated[int | None, typer.Option(min=1, max=65535, help="Port for OpenAI's API. Default: none.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="What clients of --openai have to send as API key.", envvar="PAGED_BACKEND_API_KEY"),
    ] = None,
    tensorrt_llm: Annotated[
        bool, typer.Option("--tensorrt-llm", help="Serve tensorrt_llm_bls, too, for clients of TensorRT-LLM's models.")
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="torch device, such as cpu or cuda:1.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Most tokens of prompt and output together.")] = None,
    kv_cache: Annotated[str | None, typer.Option(help="Memory for the KV cache, such as 4GiB.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the server's log.")] = False,
) -> None:
    """Serve a model with Triton Inference Server until Ctrl-C."""
    from rich.console import Console

    from paged_backend.config import EngineConfig
    from triton_server_model.launcher import TENSORRT_LLM_NAME, TritonServer
    from triton_server_model.openai.server import OpenAIServer

    given = {
        "model": model,
        "dtype": dtype,
        "device": device,
        "max_model_len": max_model_len,
        "kv_cache_bytes": kv_cache,
    }
    fields = {name: value for name, value in given.items() if value is not None}
    if repository is None and model is None:
        raise InvalidArgument("--model", model, "name a model to serve, or a --repository")
    if repository is not None and tensorrt_llm:
        raise InvalidArgument("--tensorrt-llm", True, f"put {TENSORRT_LLM_NAME} into the --repository instead")
    if repository is not None and fields:
        raise InvalidArgument("--repository", str(repository), f"its engine.json decides {', '.join(fields)}")
    server = TritonServer(
        EngineConfig(**fields) if repository is None else repository,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        verbose=verbose,
        tensorrt_llm=tensorrt_llm,
    )
    os.environ.setdefault("PAGED_BACKEND_END_WITH_ENGINE", "1")  # or the server would call a dead model ready
    front = None if openai is None else OpenAIServer(host, openai, server.address("grpc"), api_key)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for ending in (signal.SIGTERM, signal.SIGHUP):  # a closed terminal too must not leave the server behind
        signal.signal(ending, signal.default_int_handler)  # also where SIGINT is ignored, as in a script's background
    try:
        with ExitStack() as stack:
            with console.status("starting tritonserver"):
                stack.enter_context(server)
                if front is not None:
                    stack.enter_context(front)
            _show_ready(console, server, front, example=repository is None)
            while True:
                server.check()
                time.sleep(0.5)
    except KeyboardInterrupt:
        console.print("stopped")


def install_backend(
    directory: Annotated[
        Path,
        typer.Argument(
            help="Triton's backends, such as /opt/tritonserver/backends.", exists=True, file_okay=False, writable=True
        ),
    ],
    name: Annotated[
        str, typer.Option(help="What model folders call it; vllm serves those of Triton's vLLM backend.")
    ] = "paged",
) -> None:
    """Make this a backend of Triton's: its model folders need config.pbtxt and 1/engine.json, and no 1/model.py."""
    from triton_server_model import launcher

    folder = launcher.install_backend(directory, name)
    typer.echo(f'installed {folder}\n  config.pbtxt of its models says  backend: "{name}"')


def top(
    metrics: Annotated[str, typer.Option(help="The server's metrics port.")] = "http://127.0.0.1:8002/metrics",
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one table, of two looks, and exit.")] = False,
) -> None:
    """Show what a server's engines are doing until Ctrl-C: load, KV cache, tokens/s, latencies."""
    from rich.console import Console
    from rich.live import Live

    from triton_server_model.top import Watch

    watch = Watch(metrics)
    watch.look()
    if once:
        time.sleep(interval)
        watch.look()
        Console().print(watch.table(of_all_time=True))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(watch.table(), auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            watch.look()
            live.update(watch.table(), refresh=True)


def _show_ready(console: Console, server: TritonServer, front: OpenAIServer | None, *, example: bool) -> None:
    from triton_server_model.launcher import MODEL_NAME

    http = f"http://{server.address('http')}"
    console.print(f"ready, Ctrl-C stops\n  HTTP     {http}\n  gRPC     {server.address('grpc')}")
    console.print(f"  metrics  http://{server.address('metrics')}/metrics")
    if front is not None:
        console.print(f"  OpenAI   http://{front.address}/v1")
    if not example:
        return
    body = '{"text_input": "The capital of France is", "parameters": {"max_tokens": 16, "temperature": 0}}'
    console.print(f"try\n  curl -s {http}/v2/models/{MODEL_NAME}/generate -d '{body}'")
    if front is not None:
        key = "-H 'Authorization: Bearer '$PAGED_BACKEND_API_KEY " if front.has_key else ""
        messages = '[{"role": "user", "content": "What is the capital of France?"}]'
        body = f'{{"model": "{MODEL_NAME}", "messages": {messages}}}'
        address = f"http://{front.address}/v1/chat/completions"
        console.print(f"  curl -s {address} {key}-H 'Content-Type: application/json' -d '{body}'")
