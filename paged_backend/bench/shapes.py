"""Models of random weights, for measuring speed where real weights are not at hand."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from paged_backend.config import EngineConfig
    from paged_backend.engine import Engine

_LLAMA3: dict[str, Any] = {
    "num_key_value_heads": 8,
    "num_attention_heads": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
SHAPES: dict[str, dict[str, Any]] = {
    "random-1b": _LLAMA3
    | {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "head_dim": 64,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "random-8b": _LLAMA3
    | {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "head_dim": 128,
        "intermediate_size": 14336,
        "tie_word_embeddings": False,
    },
}
"""The shapes of Llama-3.2-1B and Llama-3.1-8B."""


def make_random(name: str, device: str = "auto", dtype: str = "auto") -> PreTrainedModel:
    """A model of `SHAPES[name]` with seeded random weights, made on its device; "auto" is bfloat16 here."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from paged_backend.runner.loader import resolve_device

    torch.manual_seed(0)
    weights = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    with resolve_device(device):
        return LlamaForCausalLM._from_config(LlamaConfig(**SHAPES[name]), dtype=weights).eval()


def save_random(name: str, directory: Path) -> None:
    """Save `make_random(name)`, in a process whose GPU memory is free again then; there is no tokenizer."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(_save, name, directory).result()


def _save(name: str, directory: Path) -> None:
    make_random(name).save_pretrained(directory)


def make_engine(config: EngineConfig) -> Engine:
    """An engine of `config.model`, which may be one of `SHAPES`."""
    from paged_backend.engine import Engine

    name = config.require_model()
    return Engine(config, model=make_random(name, config.device, config.dtype) if name in SHAPES else None)
