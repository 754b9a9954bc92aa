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
@pytest.mark.parametrize("small", [False, True])
def test_families_equal_transformers_with_and_without_preemption(family: str, small: bool) -> None:
    model = build(family).cuda()
    prompts = random_prompts(8, 40, 128)
    want = [own_tokens(model, prompt, 30) for prompt in prompts]
    cache: dict[str, Any] = {"num_blocks": 400}
    if small:
        cache = {"num_blocks": 36 if family == "gemma2" else 24, "max_num_seqs": 4, "max_model_len": 96}
    engine = Engine(
        EngineConfig(**{"block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 32} | cache), model=model
    )
    outputs = engine.generate(prompts, same_as_own(30, 2))
    assert [output.token_ids for output in outputs] == want
    if family != "mistral":  # its window of 8 tokens needs no more
        assert (engine.stats().preemptions > 0) == small
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


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("policy", ["swap", "recompute"])
def test_a_cache_ten_times_too_small_and_prefixes_in_the_host_tier(family: str, policy: str) -> None:
    model = build(family).cuda()
    prompts = [[9] * 40 + prompt for prompt in random_prompts(12, 20, 128, seed=3)]
    want = [own_tokens(model, prompt, 40) for prompt in prompts]
    config = EngineConfig(
        block_size=4,
        num_blocks={"llama": 26, "gemma2": 52}[family],
        max_num_batched_tokens=24,
        max_num_seqs=12,
        max_model_len=101,
        preemption_policy=policy,
        swap_space_bytes="4MiB",
    )
    engine = Engine(config, model=model)
    for _ in range(2):
        outputs = engine.generate(prompts, same_as_own(40, 2))
        assert [output.token_ids for output in outputs] == want
    stats = engine.stats()
    assert stats.preemptions > 0
    assert (stats.blocks_fetched > 0) == (stats.swapped > 0) == (policy == "swap")
    engine.close()


def test_swap_space_keeps_every_bit_of_many_blocks() -> None:
    from paged_kernels.attention import LayerSpec, ReferenceAttention

    from paged_backend.kv_cache.groups import KVGroup
    from paged_backend.kv_cache.storage import KVStorage
    from paged_backend.kv_cache.swap import SwapSpace

    spec = LayerSpec(32, 8, 128, 128, 1.0)
    layers = 32
    storage = KVStorage(
        ReferenceAttention(),
        [spec] * layers,
        [KVGroup(tuple(range(layers)))],
        num_blocks=300,
        block_size=16,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )
    for tensor in storage.tensors:
        tensor.normal_()
    swap = SwapSpace(storage, 300)
    pairs = [(block, 301 - block) for block in range(1, 301)]
    before = [tensor.clone() for tensor in storage.tensors]
    swap.store(pairs)
    for tensor in storage.tensors:
        tensor[1:] = 0
    swap.fetch([(host, block) for block, host in pairs])
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(storage.tensors, before, strict=True))
    print(f"swap: {swap.measure() / 1e9:.1f} GB/s in blocks of {sum(swap._sizes)} bytes")
    assert all(torch.equal(a, b) for a, b in zip(storage.tensors, before, strict=True))


def test_beams_and_samples_on_the_gpu() -> None:
    model = build("llama").cuda()
    engine = Engine(EngineConfig(num_blocks=300, block_size=4), model=model)
    ids = torch.tensor([[5, 6, 7, 8, 9]], device="cuda")
    want = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=12,
        do_sample=False,
    )
    (output,) = engine.generate([ids[0].tolist()], SamplingParams(beam_width=3, n=3, max_tokens=12))
    for sample, row in zip(output.samples, want[:, 5:].tolist(), strict=True):
        assert sample.token_ids == row[: len(sample.token_ids)]
    (sampled,) = engine.generate([[5] * 30], SamplingParams(n=4, seed=1, max_tokens=8, ignore_eos=True))
    assert len({tuple(sample.token_ids) for sample in sampled.samples}) == 4
    engine.close()
