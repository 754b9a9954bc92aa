"""Attention of whole prompts by cuDNN against plain attention, and where the engine uses it."""

from __future__ import annotations

import pytest
import torch
from paged_kernels.attention import LayerSpec
from paged_kernels.gpu.whole_prompt_attention import attend_to_whole_prompts, is_worth_it, supports_whole_prompts

from paged_backend import Engine, EngineConfig, SamplingParams
from tests.tiny import build


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 64), (4, 4, 128)])
@pytest.mark.parametrize(("number", "count"), [(1, 300), (3, 256)])
def test_whole_prompts(heads: int, kv_heads: int, dim: int, number: int, count: int) -> None:
    spec = LayerSpec(heads, kv_heads, dim, dim, dim**-0.5)
    qkv = torch.randn(number * count, (heads + 2 * kv_heads) * dim, device="cuda", dtype=torch.bfloat16)
    out = torch.full((number * count, heads * dim), float("nan"), device="cuda", dtype=torch.bfloat16)
    attend_to_whole_prompts(qkv, number, spec, out)
    parts = qkv.float().view(number, count, -1, dim).transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
    want = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out.float(), want.transpose(1, 2).reshape(out.shape), atol=2e-2, rtol=2e-2)


def test_the_engine_uses_it_and_gets_the_same_tokens() -> None:
    shape = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16384}
    model = build("llama", **shape).to("cuda", torch.bfloat16)
    assert is_worth_it(0, 2048)
    assert not is_worth_it(0, 2049)
    assert supports_whole_prompts(LayerSpec(4, 2, 64, 64, 0.125), torch.bfloat16, torch.device("cuda", 0))
    prompts = [[(7 * i + row) % 120 + 3 for i in range(2048)] for row in range(3)]
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    tokens = []
    for budget in (16384, 1024):  # whole, and in chunks
        engine = Engine(
            EngineConfig(num_blocks=300, max_num_batched_tokens=budget, max_prefill_tokens=budget), model=model
        )
        tokens.append([output.token_ids for output in engine.generate(prompts, params)])
        engine.close()
    assert tokens[0] == tokens[1]
