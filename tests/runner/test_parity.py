"""Greedy tokens equal transformers' `generate`, token for token, in float32."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from paged_backend import Engine, EngineConfig, SamplingParams
from paged_backend.bench.workloads import workload
from tests.tiny import FAMILIES, build


def own_tokens(model: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    """What transformers generates."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, min_new_tokens=length, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def random_prompts(count: int, longest: int, vocab: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab) for _ in range(rng.randint(1, longest))] for _ in range(count)]


# min_new_tokens keeps transformers from choosing its end-of-sequence; min_tokens with stop_token_ids does the same.
def same_as_own(length: int, eos: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=length, min_tokens=length, stop_token_ids=(eos,))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_batched_together_equal_each_alone(family: str) -> None:
    model = build(family)
    prompts = random_prompts(9, 60, 128)
    lengths = [6 + 3 * i for i in range(9)]
    want = [own_tokens(model, prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    # Chunks of prompts, several steps of mixed prefill and decode, blocks that do not divide the window.
    engine = Engine(EngineConfig(block_size=5, num_blocks=400, max_num_seqs=6, max_num_batched_tokens=32), model=model)
    outputs = engine.generate(prompts, [same_as_own(length, 2) for length in lengths])
    assert [output.token_ids for output in outputs] == want
    assert engine.stats().preemptions == 0
    engine.close()


@pytest.mark.parametrize(("family", "num_blocks"), [("llama", 20), ("gpt2", 20), ("gemma2", 28)])
def test_a_cache_so_small_that_requests_are_preempted_changes_nothing(family: str, num_blocks: int) -> None:
    model = build(family)
    prompts = random_prompts(6, 30, 128, seed=1)
    want = [own_tokens(model, prompt, 30) for prompt in prompts]
    config = EngineConfig(
        block_size=4, num_blocks=num_blocks, max_num_seqs=4, max_num_batched_tokens=24, max_model_len=64
    )
    engine = Engine(config, model=model)
    outputs = engine.generate(prompts, same_as_own(30, 2))
    assert [output.token_ids for output in outputs] == want
    assert engine.stats().preemptions > 0
    assert engine.stats().blocks_used == 0
    engine.close()


@pytest.mark.parametrize(
    ("family", "groups", "own"),
    [
        ("gemma3_text", 4, {"query_pre_attn_scalar": 16, "num_hidden_layers": 7, "sliding_window_pattern": 3}),
        ("gpt_oss", 2, {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 4}),
    ],
)
def test_hybrid_models_keep_only_the_windows(family: str, groups: int, own: dict[str, int]) -> None:
    model = build(family, head_dim=16, sliding_window=8, **own)
    prompts = [*random_prompts(4, 60, 128), [5, 6, 7] * 40]
    want = [own_tokens(model, prompt, 30) for prompt in prompts]
    engine = Engine(EngineConfig(block_size=4, num_blocks=600, max_num_seqs=6, max_num_batched_tokens=32), model=model)
    assert len(engine.tables.groups) == groups
    for _ in range(2):  # the second time with cached prefixes
        outputs = engine.generate(prompts, same_as_own(30, 2))
        assert [output.token_ids for output in outputs] == want
    assert outputs[-1].num_cached_tokens > 0
    engine.add_request(prompts[-1], same_as_own(30, 2))
    for _ in range(20):
        engine.step()
    full = -(-len(prompts[-1]) // 4) + 5
    assert engine.stats().blocks_used <= full + (groups - 1) * 3, "all of one group, the windows of the others"
    engine.close()


def test_smollm2_32_prompts_of_1_to_500_tokens(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    rng = random.Random(3)
    lengths = [1, 2, 500, *(rng.randint(1, 50) for _ in range(29))]
    prompts = [[rng.randrange(100, 30_000) for _ in range(length)] for length in lengths]
    want = [own_tokens(model, prompt, 5) for prompt in prompts]
    engine = Engine(EngineConfig(num_blocks=1200, max_num_batched_tokens=1024), model=model)
    outputs = engine.generate(prompts, same_as_own(5, 2))
    assert [output.token_ids for output in outputs] == want
    engine.close()


def test_smollm2_computes_a_shared_prefix_once(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    prompts = [prompt for prompt, _ in workload("shared16").requests[:4]]
    params, outputs, computed = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), [], []
    for caching in (True, False):
        engine = Engine(EngineConfig(num_blocks=1200, enable_prefix_caching=caching), model=model)
        outputs.append([output.token_ids for output in engine.generate(prompts, params)])
        computed.append(engine.stats().computed_tokens - 4 * 4)
        engine.close()
    assert computed == [512 + 4 * 32, 4 * (512 + 32)]
    assert outputs[0] == outputs[1]
