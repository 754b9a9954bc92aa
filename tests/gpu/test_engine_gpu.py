"""The engine on a GPU: the same tokens as transformers, and no more memory than allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paged_backend import Engine, EngineConfig, InvalidArgument, SamplingParams
from paged_backend.runner.loader import resolve_device
from tests.runner.test_parity import own_tokens, random_prompts, same_as_own
from tests.tiny import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", [{"num_blocks": 400}, {"num_blocks": 24, "max_num_seqs": 4, "max_model_len": 96}])
def test_families_equal_transformers_with_and_without_preemption(family: str, cache: dict[str, Any]) -> None:
    model = build(family).cuda()
    prompts = random_prompts(8, 40, 128)
    want = [own_tokens(model, prompt, 30) for prompt in prompts]
    engine = Engine(
        EngineConfig(**{"block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 32} | cache), model=model
    )
    outputs = engine.generate(prompts, same_as_own(30, 2))
    assert [output.token_ids for output in outputs] == want
    assert (engine.stats().preemptions > 0) == (cache["num_blocks"] == 24)
    engine.close()


def test_seeded_sampling_repeats_whatever_runs_beside_it() -> None:
    engine = Engine(EngineConfig(num_blocks=200), model=build("llama").cuda())
    params = SamplingParams(temperature=1.2, top_p=0.9, seed=3, max_tokens=30, ignore_eos=True)
    (alone,) = engine.generate([[5, 6, 7]], params)
    other = SamplingParams(temperature=0.7, top_k=5, max_tokens=30, ignore_eos=True)
    crowd = engine.generate([[9] * 20, [5, 6, 7], [8]], [other, params, other])
    assert crowd[1].token_ids == alone.token_ids
    engine.close()


def test_the_default_cache_leaves_the_rest_of_the_memory_alone() -> None:
    before = torch.cuda.mem_get_info()[0]
    total = torch.cuda.get_device_properties(0).total_memory
    engine = Engine(
        EngineConfig(gpu_memory_utilization=0.4, max_num_seqs=4096, max_num_batched_tokens=4096),
        model=build("llama").cuda(),
    )
    used = before - torch.cuda.mem_get_info()[0]
    engine.generate(random_prompts(64, 100, 128), same_as_own(4, 2))
    assert used <= 0.4 * total
    engine.close()


def test_the_default_configuration_survives_a_long_prompt_among_many_decodes() -> None:
    shape = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
    model = build("llama", **shape, max_position_embeddings=32768).to("cuda", torch.bfloat16)
    engine = Engine(EngineConfig(), model=model)
    prompts = [*random_prompts(255, 8, 32000), [7] * 30000]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=24, ignore_eos=True, top_p=0.99999))
    assert [str(output.error) for output in outputs if output.error] == []
    engine.close()


def test_more_memory_than_the_device_has_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="bytes of free memory on cuda:0"):
        Engine(EngineConfig(kv_cache_bytes="1TiB"), model=build("llama").cuda())
    with pytest.raises(InvalidArgument, match="device='cuda:63': this machine has"):
        resolve_device("cuda:63")
