"""The engine on a GPU: the same tokens as transformers, and no more memory than allowed."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from paged_backend import Engine, EngineConfig, InvalidArgument, SamplingParams
from paged_backend.runner.batch import FlatBatch
from paged_backend.runner.loader import resolve_device
from paged_backend.runner.model import PagedModel
from paged_backend.runner.runner import ModelRunner
from tests.runner.test_parity import own_tokens, random_prompts, same_as_own
from tests.tiny import FAMILIES, build

pytest.importorskip("triton")
from paged_backend.runner.device_runner import DeviceRunner

UNFUSED = {"gpt2", "gpt_neox", "opt"}
# A shape that tests in bfloat16 share, so that its kernels are compiled once.
MIDDLE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


def greedy(length: int, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": length, "ignore_eos": True} | fields)


def tokens_of(engine: Engine, prompts: list[list[int]], params: Any) -> list[list[int]]:
    outputs = engine.generate(prompts, params)
    assert [str(output.error) for output in outputs if output.error] == []
    return [output.token_ids for output in outputs]


# ---- the same tokens

PROMPTS, LENGTH = random_prompts(6, 40, 128), 20


@functools.cache
def family_of(family: str) -> tuple[PreTrainedModel, list[list[int]]]:
    """A model, and what it generates after `PROMPTS`, without token 2."""
    model = build(family).cuda()
    return model, [own_tokens(model, prompt, LENGTH) for prompt in PROMPTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_equal_transformers_with_and_without_preemption(family: str) -> None:
    model, want = family_of(family)
    # Blocks of 64 tokens, which is the default, then of 16.
    with closing(Engine(EngineConfig(num_blocks=60, max_num_seqs=6, max_num_batched_tokens=32), model=model)) as engine:
        assert (engine._paged_model.fused is None) == (family in UNFUSED)
        assert engine.config.block_size == 64
        assert engine._runner.asynchronous == (family not in UNFUSED)
        assert tokens_of(engine, PROMPTS, same_as_own(LENGTH, 2)) == want
        assert engine.stats().preemptions == 0
    small = EngineConfig(
        block_size=16,
        num_blocks=13 if family == "gemma2" else 7,
        max_num_seqs=6,
        max_model_len=64,
        max_num_batched_tokens=32,
    )
    with closing(Engine(small, model=model)) as engine:
        assert tokens_of(engine, PROMPTS, same_as_own(LENGTH, 2)) == want
        assert engine.stats().preemptions > 0 or family == "mistral", "only that needs no more than its window"
        assert engine.stats().blocks_used == 0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "without",
    [{"fuse": False}, {"cuda_graphs": False}, {"look_ahead": False}, {"attention_backend": "reference"}],
    ids=lambda without: next(iter(without)),
)
def test_every_way_to_compute_gives_the_same_tokens(family: str, without: dict[str, Any]) -> None:
    model, want = family_of(family)
    config = EngineConfig(num_blocks=60, max_num_seqs=6, max_num_batched_tokens=32, **without)
    with closing(Engine(config, model=model)) as engine:
        assert tokens_of(engine, PROMPTS, same_as_own(LENGTH, 2)) == want
        unfused = "fuse" in without or "attention_backend" in without
        assert (type(engine._runner) is ModelRunner) == unfused


def test_graphs_captured_when_first_needed_replay_what_eager_steps_compute() -> None:
    model = build("llama", max_position_embeddings=1024).cuda()
    common = [*range(3, 128), *range(127, 2, -1), *range(20, 90)]
    prompts = [common + prompt for prompt in random_prompts(5, 30, 128, seed=4)] + [[5, 6]]
    stops = tuple(range(60, 128))
    asked = [
        [greedy(12)] * 6,
        [greedy(12, min_tokens=12, stop_token_ids=stops[:40])] * 6,
        [greedy(12, min_tokens=6 + row, stop_token_ids=stops) for row in range(6)],
    ]
    got = []
    for graphs in (True, False):
        config = EngineConfig(num_blocks=100, max_num_seqs=6, cuda_graphs=graphs)
        with closing(Engine(config, model=model)) as engine:
            # Each twice: captured, then replayed from the first step on.
            got.append([tokens_of(engine, prompts, params) for params in asked for _ in range(2)])
            assert isinstance(engine._runner, DeviceRunner)
            kinds = {(one.tokens > 0, one.shared, one.samples) for one in engine._runner._graphs}
            wanted = {(False, False, True), (False, True, True), (False, True, False), (True, False, True)}
            assert kinds >= wanted and (True, False, False) not in kinds if graphs else not kinds
    assert got[0] == got[1]
    assert got[0][0::2] == got[0][1::2]
    assert got[0][0] == [own_tokens_with_any(model, prompt, 12) for prompt in prompts]
    assert not {token for tokens in got[0][2] for token in tokens} & set(stops[:40])


def own_tokens_with_any(model: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    """What transformers finds likeliest, its end-of-sequence included."""
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        for _ in range(length):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


def test_seeded_sampling_repeats_whatever_runs_beside_it() -> None:
    model, _ = family_of("llama")
    params = SamplingParams(temperature=1.2, top_p=0.9, seed=3, max_tokens=30, ignore_eos=True)
    other = SamplingParams(temperature=0.7, top_k=5, max_tokens=30, ignore_eos=True)
    with closing(Engine(EngineConfig(num_blocks=200), model=model)) as engine:
        (alone,) = engine.generate([[5, 6, 7]], params)
        crowd = engine.generate([[9] * 20, [5, 6, 7], [8]], [other, params, other])
        assert crowd[1].token_ids == alone.token_ids


@pytest.mark.parametrize("policy", ["swap", "recompute"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_cache_many_times_too_small_and_prefixes_in_the_host_tier(family: str, policy: str) -> None:
    model, prompts, want = small_cache_of(family)
    config = EngineConfig(
        block_size=16,
        num_blocks={"llama": 8, "gemma2": 16}[family],
        max_num_batched_tokens=24,
        max_num_seqs=8,
        max_model_len=96,
        preemption_policy=policy,
        swap_space_bytes="4MiB",
    )
    with closing(Engine(config, model=model)) as engine:
        for _ in range(2):
            assert tokens_of(engine, prompts, same_as_own(32, 2)) == want
        stats = engine.stats()
        assert stats.preemptions > 0
        assert (stats.blocks_fetched > 0) == (stats.swapped > 0) == (policy == "swap")


@functools.cache
def small_cache_of(family: str) -> tuple[PreTrainedModel, list[list[int]], list[list[int]]]:
    model, _ = family_of(family)
    prompts = [[9] * 40 + prompt for prompt in random_prompts(8, 20, 128, seed=3)]
    return model, prompts, [own_tokens(model, prompt, 32) for prompt in prompts]


def test_beams_and_samples_on_the_gpu() -> None:
    model, _ = family_of("llama")
    ids = torch.tensor([[5, 6, 7, 8, 9]], device="cuda")
    want = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=12,
        do_sample=False,
    )
    with closing(Engine(EngineConfig(num_blocks=60, block_size=16, max_num_seqs=8), model=model)) as engine:
        (output,) = engine.generate([ids[0].tolist()], SamplingParams(beam_width=3, n=3, max_tokens=12))
        for sample, row in zip(output.samples, want[:, 5:].tolist(), strict=True):
            assert sample.token_ids == row[: len(sample.token_ids)]
        (sampled,) = engine.generate([[5] * 30], SamplingParams(n=4, seed=1, max_tokens=8, ignore_eos=True))
        assert len({tuple(sample.token_ids) for sample in sampled.samples}) == 4


# ---- bfloat16


@functools.cache
def middle() -> PreTrainedModel:
    """A llama of 8 layers in bfloat16 whose weights are as large as those of trained models."""
    model = build("llama", **MIDDLE, num_hidden_layers=8, max_position_embeddings=2048)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 0.3
    return model.to("cuda", torch.bfloat16)


def forward(paged: PagedModel, tokens: Tensor, starts: int, ends: int, block_size: int) -> Tensor:
    """Log-probabilities `[rows, ends - starts, vocab]`; row i of `tokens` has blocks of its own."""
    rows, longest = tokens.shape
    width = -(-longest // block_size)
    tables = np.arange(1, rows * width + 1, dtype=np.int32).reshape(1, rows, width)
    positions = np.tile(np.arange(starts, ends), rows)
    row = np.repeat(np.arange(rows), ends - starts)
    flat = FlatBatch(
        input_ids=tokens[:, starts:ends].flatten().cpu().numpy(),
        positions=positions,
        slot_mapping=tables[:, row, positions // block_size].astype(np.int64) * block_size + positions % block_size,
        block_tables=tables,
        logits_at=np.arange(len(positions)),
    )
    logits = paged.forward(flat, [starts] * rows, [ends - starts] * rows)
    return logits.view(rows, ends - starts, -1).log_softmax(-1)


def test_fused_bfloat16_is_as_exact_as_that_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    own = middle()
    exact, model = copy.deepcopy(own).float(), copy.deepcopy(own)
    tokens = torch.tensor(np.random.default_rng(0).integers(3, 32000, (8, 160)), device="cuda")
    engine = Engine(EngineConfig(num_blocks=100, max_num_seqs=16), model=model)
    with closing(engine), torch.inference_mode():
        want = exact(tokens).logits.log_softmax(-1)
        of_transformers = float((own(tokens).logits.float().log_softmax(-1) - want).abs().mean())
        paged, block_size = engine._paged_model, engine.config.block_size
        assert paged.fused is not None
        bounds = [0, 100, 144, *range(145, 161)]  # a chunk, one after it, and decodes
        first, second = (
            torch.cat([forward(paged, tokens, *of, block_size) for of in itertools.pairwise(bounds)], dim=1)
            for _ in range(2)
        )
        assert torch.equal(first, second), "the same forward gave other bits"
        errors = (first - want).abs()
        chunks, decodes = float(errors[:, :144].mean()), float(errors[:, 144:].mean())
        # One token takes other kernels.
        forward(paged, tokens[:1], 0, 144, block_size)
        one = torch.cat([forward(paged, tokens[:1], at, at + 1, block_size) for at in range(144, 160)], dim=1)
        alone = float((one[0] - want[0, 144:]).abs().mean())
        with capsys.disabled():
            print(f"\nmean errors: {chunks:.2g}, {decodes:.2g}, {alone:.2g}; of transformers {of_transformers:.2g}")
        assert max(chunks, decodes, alone) <= 1.25 * of_transformers


def test_the_same_batch_gets_the_same_tokens_again_and_with_graphs_or_without() -> None:
    prompts = random_prompts(24, 200, 32000, seed=9)
    params = [
        SamplingParams(temperature=row % 3 / 2, top_p=0.9 if row % 2 else 1, seed=row, max_tokens=24, ignore_eos=True)
        for row in range(24)
    ]
    got = []
    for graphs in (True, False):
        # So that the second time nothing is cached, and steps are the same.
        config = EngineConfig(num_blocks=200, max_num_seqs=16, cuda_graphs=graphs, enable_prefix_caching=False)
        with closing(Engine(config, model=middle())) as engine:
            got += [tokens_of(engine, prompts, params) for _ in range(2)]
    assert got[0] == got[1]
    assert got[2] == got[3]
    assert got[0] == got[2]


def test_the_default_configuration_survives_a_long_prompt_among_many_decodes() -> None:
    model = build("llama", **MIDDLE, max_position_embeddings=32768).to("cuda", torch.bfloat16)
    with closing(Engine(EngineConfig(), model=model)) as engine:
        prompts = [*random_prompts(255, 8, 32000), [7] * 30000]
        tokens_of(engine, prompts, SamplingParams(max_tokens=24, ignore_eos=True, top_p=0.99999))


# ---- memory


def test_the_default_cache_leaves_the_rest_of_the_memory_alone() -> None:
    model = build("llama").cuda()
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    total = torch.cuda.get_device_properties(0).total_memory
    config = EngineConfig(gpu_memory_utilization=0.4, max_num_seqs=4096, max_num_batched_tokens=4096)
    with closing(Engine(config, model=model)) as engine:
        used = before - torch.cuda.mem_get_info()[0]
        engine.generate(random_prompts(64, 100, 128), same_as_own(4, 2))
        assert used <= 0.4 * total


def test_more_memory_than_the_device_has_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="bytes of free memory on cuda:0"):
        Engine(EngineConfig(kv_cache_bytes="1TiB"), model=build("llama").cuda())
    with pytest.raises(InvalidArgument, match="device='cuda:63': this machine has"):
        resolve_device("cuda:63")


def test_engines_that_were_closed_leave_nothing_on_the_device() -> None:
    model = build("llama").cuda()
    left = []
    for _ in range(3):
        with closing(Engine(EngineConfig(num_blocks=60, max_num_seqs=6), model=model)) as engine:
            engine.generate(PROMPTS, greedy(4))
        del engine
        gc.collect()
        left.append(torch.cuda.memory_allocated())
    assert left[1] == left[2], "the first may leave workspaces of libraries"


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
