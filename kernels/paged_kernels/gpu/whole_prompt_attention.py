"""Attention of prompts that begin in this step: their keys and values are at hand, contiguous, and nothing is cached.

torch's cuDNN attention then does what no kernel in the Triton language has reached here: 520 to 650 TFLOP/s at
dim 128 on an H100, against 380 to 480.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from paged_kernels.attention import LayerSpec


def supports_whole_prompts(spec: LayerSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `attend_to_whole_prompts` can do these heads there."""
    plain = spec.window is None and spec.chunk is None and spec.softcap is None
    return (
        plain
        and spec.key_dim in (64, 128)
        and dtype in (torch.float16, torch.bfloat16)
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
    )


def is_worth_it(start: int, count: int) -> bool:
    """Whether a chunk of a prompt should go to `attend_to_whole_prompts`.

    cuDNN prepares itself for each length anew, which takes it longer than short prompts do.
    """
    return start == 0 and (count >= 8192 or (count >= 2048 and count % 1024 == 0))


def attend_to_whole_prompts(qkv: Tensor, number: int, spec: LayerSpec, out: Tensor) -> None:
    """Causal attention within each of `number` prompts of equal length.

    `qkv` is `[tokens, (heads + 2 * KV heads) * dim]`, roped; `out` `[tokens, heads * dim]` is written.
    """
    heads = qkv.view(number, -1, spec.num_heads + 2 * spec.num_kv_heads, spec.key_dim).transpose(1, 2)
    query, key, value = torch.split(heads, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        attended = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=spec.scale, enable_gqa=spec.group > 1
        )
    out.view(number, -1, spec.num_heads, spec.key_dim).copy_(attended.transpose(1, 2))
