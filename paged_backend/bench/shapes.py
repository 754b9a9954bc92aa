"""Models of random weights, for measuring speed where real weights are not at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def save_random(name: str, directory: Path) -> None:
    """Save a model of `SHAPES[name]` with seeded random bfloat16 weights; there is no tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPES[name]), dtype=torch.bfloat16)
    model.save_pretrained(directory)
