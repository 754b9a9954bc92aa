"""Streams answers to many questions at once from a real tritonserver: `python -m triton_server_model.demo`."""

from __future__ import annotations

import http.client
import json
import queue
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from paged_backend.bench.prompts import PROMPTS
from paged_backend.config import EngineConfig
from paged_backend.errors import PagedBackendError
from paged_backend.models import KNOWN, pull, resolve
from triton_server_model.launcher import MODEL_NAME, ServerError, TritonServer, free_ports

_LOOK_SECONDS = 0.25
"""Between looks at the metrics port."""


@dataclass(slots=True)
class Answer:
    """One question's answer so far. Times are `time.perf_counter()`."""

    question: str
    asked: float = 0.0
    text: str = ""
    times: list[float] = field(default_factory=list)
    """When each response came."""
    done: bool = False

    @property
    def line(self) -> str:
        """The text on one line."""
        return escape(" ".join(self.text.split()))


def main(
    model: Annotated[str, typer.Option(help="A chat model, as for `paged-backend serve`.")] = "smollm2-135m-instruct",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of each answer.")] = 64,
) -> None:
    """Start a server, ask it sixteen questions at once, and show how fast the answers come."""
    console = Console(highlight=False)
    try:
        path = pull(model, console.print) if model in KNOWN else resolve(model)
        _demo(console, path, max_tokens)
    except PagedBackendError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


def _demo(console: Console, path: Path, max_tokens: int) -> None:
    answers = [Answer(question) for question in PROMPTS]
    http_port, grpc_port, metrics_port = free_ports(3)
    config = EngineConfig(model=str(path), dtype="bfloat16")
    server = TritonServer(config, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port)
    console.print(f"starting tritonserver with {path.name}", markup=False)
    began = time.perf_counter()
    with ThreadPoolExecutor(1) as beside:
        loading = beside.submit(_load_tokenizer, path)
        with server:
            console.print(f"ready after {time.perf_counter() - began:.1f} s; asking {len(PROMPTS)} questions at once")
            tokenizer = loading.result()
            used, total = _ask(console, server, tokenizer, answers, max_tokens)

    def count(answer: Answer) -> int:
        return len(tokenizer.encode(answer.text, add_special_tokens=False))

    console.print(_summary(answers, count))
    tokens = sum(count(answer) for answer in answers)
    seconds = max(answer.times[-1] for answer in answers) - answers[0].asked
    console.print(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s in all")
    console.print(f"KV blocks: at most {used:.0f} of {total:.0f} in use at once")


def _load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def _ask(
    console: Console, server: TritonServer, tokenizer: Any, answers: list[Answer], max_tokens: int
) -> tuple[float, float]:
    """Fill in the answers. Returns the KV blocks used at most and in all."""
    from tritonclient.grpc import InferenceServerClient

    responses: queue.SimpleQueue[tuple[float, Any, Any]] = queue.SimpleQueue()
    client = InferenceServerClient(server.address("grpc"), channel_args=[("grpc.enable_http_proxy", 0)])
    client.start_stream(lambda result, error: responses.put((time.perf_counter(), result, error)))
    used = total = next_look = 0.0
    try:
        with Live(console=console, refresh_per_second=8) if console.is_terminal else nullcontext() as live:
            for number, answer in enumerate(answers):
                messages = [{"role": "user", "content": answer.question}]
                prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                answer.asked = time.perf_counter()
                client.async_stream_infer(MODEL_NAME, _inputs(prompt, max_tokens), request_id=str(number))
            while not all(answer.done for answer in answers):
                heard = _receive(server, responses, answers)
                if live is not None:
                    live.update(_screen(answers))
                elif heard is not None and heard.done:
                    console.print(f"{escape(heard.question)}\n  {heard.line}", soft_wrap=True)
                if time.perf_counter() >= next_look:
                    now, total = _blocks(server)
                    used, next_look = max(used, now), time.perf_counter() + _LOOK_SECONDS
    finally:
        client.stop_stream()
        client.close()
    return used, total


def _inputs(prompt: str, max_tokens: int) -> list[Any]:
    import numpy as np
    from tritonclient.grpc import InferInput

    sampling = json.dumps({"max_tokens": max_tokens, "temperature": 0})
    values = {"text_input": prompt.encode(), "sampling_parameters": sampling.encode(), "stream": True}
    inputs = [InferInput(name, [1], "BOOL" if value is True else "BYTES") for name, value in values.items()]
    for tensor, value in zip(inputs, values.values(), strict=True):
        tensor.set_data_from_numpy(np.array([value], dtype=bool if value is True else np.object_))
    return inputs


def _receive(server: TritonServer, responses: Any, answers: list[Answer]) -> Answer | None:
    """The answer that the next response is of; None if none comes soon."""
    try:
        when, result, error = responses.get(timeout=_LOOK_SECONDS)
    except queue.Empty:
        server.check()
        return None
    if error is not None:
        raise ServerError(error.message())
    response = result.get_response()
    answer = answers[int(response.id)]
    answer.text += result.as_numpy("text_output")[0].decode()
    answer.times.append(when)
    answer.done = response.parameters["triton_final_response"].bool_param
    return answer


def _blocks(server: TritonServer) -> tuple[float, float]:
    connection = http.client.HTTPConnection(server.address("metrics"), timeout=5)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    used, total = (
        sum(map(float, re.findall(rf"^paged_backend_kv_blocks_{name}{{.*}} (\S+)$", text, re.MULTILINE)))
        for name in ("used", "total")
    )
    return used, total


def _screen(answers: list[Answer]) -> Table:
    table = Table("question", "answer", expand=True)
    for answer in answers:
        table.add_row(escape(answer.question), answer.line[-200:])
    return table


def _summary(answers: list[Answer], count: Callable[[Answer], int]) -> Table:
    table = Table("question")
    for column in ("tokens", "TTFT ms", "tokens/s"):
        table.add_column(column, justify="right")
    for answer in answers:
        tokens, first, last = count(answer), answer.times[0], answer.times[-1]
        rate = f"{(tokens - 1) / (last - first):.1f}" if last > first else "-"
        table.add_row(escape(answer.question), str(tokens), f"{(first - answer.asked) * 1e3:.0f}", rate)
    return table


if __name__ == "__main__":
    typer.run(main)
