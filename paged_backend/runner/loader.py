"""Loads a model and its tokenizer with transformers' own loaders."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from paged_backend.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from paged_backend.config import EngineConfig


@dataclass(slots=True)
class LoadedModel:
    """A causal language model in eval mode on its device, and its tokenizer (None: prompts are token ids)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None


def load_model(config: EngineConfig) -> LoadedModel:
    """Load `config.model`. Raises `InvalidArgument` for a model or device that is not there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from paged_backend import models

    path = models.resolve(config.require_model(), revision=config.revision)
    device = resolve_device(config.device)
    try:
        # Straight to a GPU, shard by shard: nothing is gathered in host memory.
        placed = {} if device.type == "cpu" else {"device_map": {"": device}}
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=config.dtype, trust_remote_code=config.trust_remote_code, use_safetensors=True, **placed
        )
        has_tokenizer = any(
            (path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
        )
        tokenizer = (
            AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code) if has_tokenizer else None
        )
    except (OSError, ValueError) as error:
        raise InvalidArgument("model", config.model, f"transformers cannot load it: {error}") from error
    return LoadedModel(model.eval(), tokenizer)


def resolve_device(name: str) -> torch.device:
    """The torch device called `name`; "auto" is the first CUDA device, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidArgument("device", name, f"not a torch device: {error}") from error
    if device.type not in ("cpu", "cuda"):
        raise InvalidArgument("device", name, "must be auto, cpu or cuda[:index]")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InvalidArgument("device", name, f"this machine has {count} CUDA devices")
        device = torch.device("cuda", device.index or 0)
    return device


def context_length(model: PreTrainedModel) -> int:
    """Positions within which the model computes the same whatever else is in the batch.

    "dynamic" and "longrope" rotary embeddings switch frequencies by the longest position in the batch once it passes
    the length the model was first trained for; up to that length they never switch.
    """
    text_config = model.config.get_text_config()
    limits = [text_config.max_position_embeddings] if getattr(text_config, "max_position_embeddings", None) else []
    pending: list[Any] = [getattr(text_config, "rope_parameters", None)]
    while pending:
        rope = pending.pop()
        if not isinstance(rope, dict):
            continue
        pending.extend(rope.values())
        if rope.get("rope_type") in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings") or getattr(
                text_config, "original_max_position_embeddings", None
            )
            limits.append(original or text_config.max_position_embeddings)
    if not limits:
        limits = [
            n
            for name in ("n_positions", "n_ctx", "max_seq_len")
            if isinstance(n := getattr(text_config, name, None), int)
        ]
    return min(limits, default=2**20)


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """End-of-sequence tokens, from the generation config, else the model config."""
    for config in (model.generation_config, model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()


def keeps_logits(model: PreTrainedModel) -> bool:
    """Whether the model's forward runs its head on chosen positions only (`logits_to_keep`)."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters
