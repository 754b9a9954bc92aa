"""Tiny random models in float32, with noise on every weight: default initialisation hides mistakes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    "phi3": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}


def build(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    """The same weights for the same arguments."""
    config = AutoConfig.for_model(family, **SHAPE | FAMILIES.get(family, {}) | overrides)
    torch.manual_seed(7)
    # Older transformers would give gemma2 an sdpa that forgets its soft-cap.
    attention = {"attn_implementation": "eager"} if family == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(config, **attention).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * 0.08
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    """Left-padded input_ids and attention_mask of random prompts."""
    generator = torch.Generator().manual_seed(sum(lengths))
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, 128, (length,), generator=generator)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@dataclass
class Pair:
    """The same model twice: as transformers made it, and patched (strict)."""

    plain: PreTrainedModel
    paged: PreTrainedModel

    def check(self, **arguments: Any) -> torch.Tensor:
        """Both generate the same; returns it."""
        want, got = self.plain.generate(**arguments), self.paged.generate(**arguments)
        assert got.dtype == want.dtype
        assert got.tolist() == want.tolist()
        return got
