"""The same `model.generate(...)` before and after `patch(model)`: are the texts the same, and what does it gain?"""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hf_integration import paged
from paged_backend.bench.prompts import PROMPTS
from paged_backend.models import resolve

NEW_TOKENS = 64


def demo(
    model: Annotated[
        str, typer.Option(help="Local directory, hub id, or a name listed by `paged-backend models`.")
    ] = "smollm2-135m-instruct",
) -> None:
    """Time plain and patched generate on one left-padded batch of chat prompts, greedy, in float32."""
    console = Console()
    logging.disable_progress_bar()
    path = resolve(model)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    causal_lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    inputs = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in PROMPTS],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    inputs["pad_token_id"] = tokenizer.pad_token_id

    plain, plain_seconds = measure(causal_lm, inputs)
    with paged(causal_lm, strict=True):
        patched, patched_seconds = measure(causal_lm, inputs)

    width = inputs["input_ids"].shape[1]
    eos = torch.tensor(causal_lm.generation_config.eos_token_id)
    # A row counts up to its first end-of-sequence; what follows is padding.
    tokens = int((torch.isin(plain[:, width:], eos).cumsum(1).cumsum(1) <= 1).sum())
    cpu = causal_lm.device.type == "cpu"
    hardware = f"{torch.get_num_threads()} CPU threads" if cpu else torch.cuda.get_device_name()
    table = Table(title=f"{model}, {len(PROMPTS)} prompts, {tokens} new tokens, float32, {hardware}")
    for heading in ("generate", "seconds", "tokens/s", "ratio"):
        table.add_column(heading, justify="left" if heading == "generate" else "right")
    for name, seconds in (("plain", plain_seconds), ("patched", patched_seconds)):
        table.add_row(name, f"{seconds:.2f}", f"{tokens / seconds:.1f}", f"{plain_seconds / seconds:.2f}")
    console.print(table)

    texts = [tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True) for ids in (plain, patched)]
    different = [(prompt, *pair) for prompt, *pair in zip(PROMPTS, *texts, strict=True) if pair[0] != pair[1]]
    for prompt, plain_text, patched_text in different:
        console.print(f"[red]{prompt}[/]\n  plain:   {plain_text!r}\n  patched: {patched_text!r}", highlight=False)
    if different:
        raise typer.Exit(1)
    console.print(f"All {len(PROMPTS)} texts are equal. The first: {texts[0][0]!r}", highlight=False)


def measure(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """What generate() returns, and the seconds it takes, after a short call to warm up."""
    model.generate(**inputs, do_sample=False, max_new_tokens=4)
    began = time.perf_counter()
    ids: torch.Tensor = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    return ids, time.perf_counter() - began


if __name__ == "__main__":
    typer.run(demo)
