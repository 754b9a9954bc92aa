"""The runner whose tokens stay on the device gives the tokens that transformers and the reference backend give."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from paged_kernels.sampling import SamplingBatch
from transformers import PreTrainedModel

from paged_backend import Engine, EngineConfig, RequestOutput, SamplingParams
from paged_backend.kv_cache.block_pool import BlockPool
from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.kv_cache.groups import KVGroup
from paged_backend.plugins import hookimpl
from paged_backend.request import Request
from paged_backend.runner.batch import BatchState
from paged_backend.runner.runner import ModelRunner
from paged_backend.scheduler.plan import StepPlan
from tests.runner.test_parity import own_tokens, random_prompts, same_as_own
from tests.tiny import build

pytest.importorskip("triton")
from paged_kernels.gpu import decode_attention
from paged_kernels.gpu.shared_prefix import find_prefixes
from paged_kernels.gpu.step import apply_changes_reference

from paged_backend.runner import device_runner
from paged_backend.runner.device_runner import DeviceRunner
from paged_backend.runner.device_state import DeviceState

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for programs without work as for others."""
    if DEVICE == "cpu":
        monkeypatch.setattr(decode_attention, "_programs", lambda device: 2)


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.blocks_used) == (0, 0, 0)
        assert not engine._in_flight
        engine.tables.check()
        engine.close()


@pytest.fixture
def make(engines: list[Engine]) -> Any:
    def make_engine(model: PreTrainedModel | None = None, *plugins: object, **config: Any) -> Engine:
        fields = {
            "attention_backend": "triton",
            "block_size": 4,
            "num_blocks": 200,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 24,
        }
        engine = Engine(EngineConfig(**fields | config), model=model or small(), plugins=plugins)
        engines.append(engine)
        return engine

    return make_engine


def small(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    """A model of few programs."""
    layers = 2 if family == "gemma2" else 1  # gemma2: one with a window, one without
    shape = {"num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1}
    return build(family, **shape | overrides).to(DEVICE)


def runner_of(engine: Engine) -> DeviceRunner:
    assert isinstance(engine._runner, DeviceRunner)
    return engine._runner


def watch(engine: Engine) -> list[StepPlan]:
    """The plans of all steps from now on."""
    plans: list[StepPlan] = []
    launch = engine._runner.launch

    def launch_and_tell(plan: StepPlan) -> Any:
        plans.append(plan)
        return launch(plan)

    engine._runner.launch = launch_and_tell  # type: ignore[method-assign]
    return plans


def greedy(length: int, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": length, "ignore_eos": True} | fields)


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


# ---- the same tokens


@pytest.mark.parametrize(
    ("family", "overrides", "sizes"),
    [
        ("llama", {}, []),
        ("mistral", {}, [(0, 16), (4, 16)]),
        ("gemma2", {"final_logit_softcapping": 3.0}, [(0, 16), (2, 8), (3, 16)]),
        ("gpt_oss", {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, []),
    ],
)
def test_chunks_and_decodes_in_one_step_equal_each_alone(
    make: Any, monkeypatch: pytest.MonkeyPatch, family: str, overrides: dict[str, Any], sizes: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(device_runner, "_TOKENS_A_CHUNK", 5)
    model, room = build(family, **overrides).to(DEVICE), DeviceRunner._room
    prompts = [*random_prompts(3, 12, 128), list(range(30, 57))]
    lengths = [7, 3, 5, 4]
    want = [own_tokens(model, prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    engine = make(model, max_num_seqs=3, max_num_batched_tokens=12)
    assert len(engine.tables.groups) == (2 if family in ("gemma2", "gpt_oss") else 1)
    runner_of(engine)._mixed_sizes = sizes
    padded = []
    monkeypatch.setattr(DeviceRunner, "_room", lambda *of: padded.append(room(*of)) or padded[-1])
    plans = watch(engine)
    # Logits that are edited, as by `same_as_own`, are not padded to sizes.
    outputs = engine.generate(prompts, [greedy(length) if sizes else same_as_own(length, 2) for length in lengths])
    assert tokens_of(outputs) == want
    kinds = {(bool((plan.counts == 1).any()), bool((plan.counts > 1).any())) for plan in plans if len(plan.slots)}
    assert kinds == {(True, False), (False, True), (True, True)}
    assert any(not plan.samples.all() for plan in plans), "no prompt was cut"
    assert engine.stats().steps < sum(lengths), "nothing ran together"
    assert len(set(padded)) == len(sizes), "a size that no step was padded to"


@pytest.mark.parametrize(("family", "num_blocks"), [("llama", 8), ("gemma2", 14)])
def test_a_cache_so_small_that_requests_are_preempted_changes_nothing(make: Any, family: str, num_blocks: int) -> None:
    model = small(family)
    prompts = [[8 + row, *range(20, 20 + 3 * row)] for row in range(4)]
    want = [own_tokens(model, prompt, 9) for prompt in prompts]
    engine = make(model, num_blocks=num_blocks, max_num_batched_tokens=12, max_model_len=20)
    assert tokens_of(engine.generate(prompts, same_as_own(9, 2))) == want
    assert engine.stats().preemptions > 0


def test_every_number_of_rows_is_padded_and_nobody_notices(make: Any) -> None:
    model = small()
    prompts = [[9 + row] for row in range(7)]
    want = [own_tokens(model, prompt, 2 + row) for row, prompt in enumerate(prompts)]
    engine = make(model, max_num_seqs=7)  # none of the usual sizes
    runner = runner_of(engine)
    assert [runner._size(rows) for rows in range(1, 8)] == [1, 2, 4, 4, 7, 7, 7]
    plans = watch(engine)
    assert tokens_of(engine.generate(prompts, [greedy(2 + row) for row in range(7)])) == want
    assert {len(plan.slots) for plan in plans} == set(range(8))


def test_sizes_of_batches() -> None:
    runner = object.__new__(DeviceRunner)
    runner._pads = True
    for num_slots in (1, 3, 8, 256, 300, 512, 1000):
        runner._tokens = torch.zeros(num_slots)
        sizes = [runner._size(rows) for rows in range(1, num_slots + 1)]
        assert sizes == sorted(sizes)
        assert all(rows <= size <= num_slots for rows, size in enumerate(sizes, start=1))
        assert sizes[-1] == num_slots
        assert len(set(sizes)) <= len(device_runner._SIZES) + 1


def test_prefixes_shared_by_many_rows_are_read_once_with_the_same_tokens(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(max_position_embeddings=512)
    common = random.Random(1).choices(range(3, 128), k=272)
    prompts = [[*common, 5 + row, 6][: 273 + row % 2] for row in range(4)] + [[7, 8]]
    lengths = [3, 4, 3, 3, 2]
    want = [own_tokens(model, prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
    params = [greedy(length) for length in lengths]
    engine = make(model, block_size=16, max_num_seqs=6, max_num_batched_tokens=288, max_prefill_tokens=288)
    runner, found = runner_of(engine), []

    def find_and_tell(*arguments: Any) -> Any:
        found.append(find_prefixes(*arguments))
        return found[-1]

    monkeypatch.setattr(device_runner, "find_prefixes", find_and_tell)
    assert tokens_of(engine.generate(prompts, params)) == want
    shared = {(len(rows), tokens) for prefixes in found for rows, tokens in prefixes}
    assert shared == {(4, 256)}, "which rows shared how much"
    assert engine.stats().cached_tokens >= 3 * 256
    assert len(found) < engine.stats().steps, "searched anew though nobody came or went"
    monkeypatch.setattr(device_runner, "find_prefixes", lambda *arguments: [])
    runner._prefixes_of = None
    again = engine.generate(prompts, params)
    assert tokens_of(again) == want
    assert again[3].num_cached_tokens == 272


# ---- stops


def test_no_stop_before_min_tokens_in_decodes_and_beside_chunks(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    free = [own_tokens(model, prompt, 6) for prompt in ([5, 6, 7], [9])]
    stops = sorted({*free[0], *free[1]})
    prompts = [[5, 6, 7], [9], [5, 6, 7], [9], list(range(30, 60))]
    least = [0, 2, 4, 6, 3]
    params = [
        greedy(6, stop_token_ids=stops if row < 4 else free[0][:1], min_tokens=count) for row, count in enumerate(least)
    ]
    config = {"max_num_batched_tokens": 8, "max_num_seqs": 5}
    want = make(attention_backend="reference", **config).generate(prompts, params)
    engine = make(model, **config)
    runner_of(engine)._mixed_sizes = [(5, 16)]
    is_edited, seen = DeviceRunner._is_edited, set()

    def ask_and_tell(runner: DeviceRunner, plan: StepPlan) -> bool:
        edited = is_edited(runner, plan)
        seen.add((edited, bool((plan.counts > 1).any())))
        return edited

    monkeypatch.setattr(DeviceRunner, "_is_edited", ask_and_tell)
    outputs = engine.generate(prompts, params)
    assert [(output.token_ids, output.finish_reason) for output in outputs] == [
        (output.token_ids, output.finish_reason) for output in want
    ]
    for output, count in zip(outputs[:4], least, strict=False):
        assert output.num_output_tokens > count or output.finish_reason == "length"
        assert not set(output.token_ids[:count]) & set(stops)
    assert {(True, False), (True, True)} <= seen, "steps with forbidden tokens, of decodes and with chunks"


def test_many_requests_with_as_many_stop_tokens_as_are_allowed(make: Any) -> None:
    engine = make(small(vocab_size=512), max_num_seqs=20)
    params = greedy(2, stop_token_ids=range(100, 356), min_tokens=2)
    outputs = engine.generate([[5 + row] for row in range(20)], params)
    assert [output.error for output in outputs] == [None] * 20
    assert not {token for output in outputs for token in output.token_ids} & set(range(100, 356))


# ---- steps whose logits the host sees


def test_beams_and_samples_beside_others_and_the_device_goes_on_afterwards(make: Any) -> None:
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12], list(range(30, 50))]
    params = [greedy(11), greedy(3, beam_width=2, n=2, ignore_eos=False), greedy(4, n=2), greedy(4)]
    config = {"max_num_batched_tokens": 10, "max_num_seqs": 6}
    want = make(attention_backend="reference", **config).generate(prompts, params)
    engine = make(**config)
    plans = watch(engine)
    outputs = engine.generate(prompts, params)
    for output, wanted in zip(outputs, want, strict=True):
        assert output.token_ids == wanted.token_ids
        assert tokens_of(list(output.samples)) == tokens_of(list(wanted.samples))
    steered = [any(request.steered for request in plan.sampling) for plan in plans if len(plan.slots)]
    assert True in steered
    assert not any(steered[-3:]), "the device chose tokens again after the beams had ended"
    assert any(plan.samples.any() and (plan.counts > 1).any() for plan in plans)


class Forbid:
    """A logits processor that forbids the last token of each request."""

    @hookimpl
    def paged_logits_processor(self, config: EngineConfig) -> Any:
        def process(logits: torch.Tensor, requests: list[Request]) -> None:
            for row, request in enumerate(requests):
                logits[row, request.token_ids[-1]] = float("-inf")

        return process


class Least:
    """A sampler of the least likely token."""

    @hookimpl
    def paged_sampler(self, config: EngineConfig) -> Any:
        def choose(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
            return logits.argmin(-1)

        return choose


@pytest.mark.parametrize("plugin", [Forbid(), Least()])
def test_plugins_that_see_logits(make: Any, plugin: object) -> None:
    prompts, params = [[5, 6, 7], [8] * 11], greedy(6)
    want = make(None, plugin, attention_backend="reference").generate(prompts, params)
    engine = make(None, plugin)
    assert type(engine._runner) is ModelRunner
    assert engine._paged_model.fused is not None
    assert tokens_of(engine.generate(prompts, params)) == tokens_of(want)
    if isinstance(plugin, Forbid):
        assert all(a != b for output in want for a, b in zip(output.token_ids, output.token_ids[1:], strict=False))


# ---- sampling


DRAWN = [
    SamplingParams(temperature=1.1, seed=3, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0.9, top_k=20, min_p=0.01, seed=2**62 + 5, max_tokens=3, ignore_eos=True),
]
DRAWN_PROMPTS = [[5, 6, 7], [*range(20, 33)]]


def test_equal_seeds_draw_equal_tokens_whatever_runs_beside_and_however_prompts_are_cut(make: Any) -> None:
    engine = make(max_num_batched_tokens=64, enable_prefix_caching=False)
    alone = [engine.generate([prompt], params)[0] for prompt, params in zip(DRAWN_PROMPTS, DRAWN, strict=True)]
    crowd = make(max_num_batched_tokens=5, num_blocks=5, max_model_len=18)
    outputs = crowd.generate([[9] * 5, *DRAWN_PROMPTS], [greedy(10), *DRAWN])
    assert tokens_of(outputs[1:]) == tokens_of(alone)
    assert crowd.stats().preemptions > 0
    other_seed = DRAWN[0].model_copy(update={"seed": 4})
    (another,) = engine.generate(DRAWN_PROMPTS[:1], other_seed)
    assert another.token_ids != alone[0].token_ids


def test_equal_seeds_draw_equal_tokens_beside_beams(make: Any) -> None:
    engine = make()
    (alone,) = engine.generate(DRAWN_PROMPTS[:1], DRAWN[0])
    beside, _ = engine.generate([DRAWN_PROMPTS[0], [8, 9]], [DRAWN[0], greedy(4, beam_width=2, ignore_eos=False)])
    assert beside.token_ids == alone.token_ids


def test_drawn_tokens_obey_their_filters(make: Any) -> None:
    engine = make()
    (output,) = engine.generate([[5, 6, 7]], SamplingParams(top_k=1, temperature=2.0, max_tokens=3, ignore_eos=True))
    assert output.token_ids == engine.generate([[5, 6, 7]], greedy(3))[0].token_ids
    (sampled,) = engine.generate([[5] * 9], SamplingParams(n=3, seed=1, max_tokens=5, ignore_eos=True))
    assert len({tuple(sample.token_ids) for sample in sampled.samples}) == 3


# ---- not a number


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_only_the_request_whose_logits_are_not_finite_fails(make: Any, family: str) -> None:
    model = small(family, tie_word_embeddings=False)
    engine = make(model, max_num_batched_tokens=16, num_blocks=40, max_model_len=48)
    params = SamplingParams(seed=3, max_tokens=6, ignore_eos=True)
    late, others = [5, 6, 7], [[40] * 9, [41]]
    (made,) = tokens_of(engine.generate([late], params))
    want = tokens_of(engine.generate(others, greedy(4)))
    unseen = set(range(3, 128)) - {token for tokens in [late, *others, *want] for token in tokens}
    at = next(at for at in range(1, 6) if made[at] in unseen - set(made[:at]))
    early = next(token for token in unseen if token not in made)
    with torch.no_grad():
        model.get_input_embeddings().weight[[made[at], early]] = float("nan")
    engine.reset_prefix_cache()
    prompts = [late, others[0], [early] * 5, others[1]]
    outputs = engine.generate(prompts, [params, greedy(4), params, greedy(4)])
    assert tokens_of(outputs) == [made[: at + 1], want[0], [], want[1]]
    assert [type(output.error) for output in outputs] == [FloatingPointError, type(None)] * 2
    assert tokens_of(engine.generate(others, greedy(4))) == want, "blocks that held NaN are used again"


# ---- what the device knows of slots


def tables_of(num_slots: int = 3, groups: int = 2) -> BlockTables:
    return BlockTables(BlockPool(60), block_size=4, num_slots=num_slots, max_model_len=40, groups=[KVGroup()] * groups)


def request_in(slot: int, **params: Any) -> Request:
    tokens = [7, 8, 9]
    made = SamplingParams(**params)
    return Request("name", tokens, 3, made, 40, frozenset(), seed=params.get("seed", 0), slot=slot)


class Mirror:
    """A device state, and what has reached it."""

    def __init__(self, tables: BlockTables) -> None:
        self.tables, self.host = tables, BatchState(tables.array.shape[1], 40)
        self.device = DeviceState(tables, torch.device("cpu"))

    def load(self, request: Request, last_token: int) -> None:
        self.host.load(request)
        self.device.load(request.slot, self.host, last_token)

    def send(self, *slots: int) -> int:
        """The number of changes, all of which are of different places."""
        changes = self.device.take_changes(np.array(slots, dtype=np.int64))
        assert len(np.unique(changes[:, 0])) == len(changes)
        apply_changes_reference(self.device.tensor, torch.from_numpy(changes))
        for slot in slots:
            width = int(self.tables.lengths[slot])
            known = self.device.block_tables[:, slot, :width].numpy()
            assert (known == self.tables.array[:, slot, :width]).all()
        return len(changes)


def test_parameters_reach_the_device_as_they_are() -> None:
    mirror = Mirror(tables_of())
    params = {"temperature": 0.7, "top_k": 2**31 - 1, "top_p": 0.9, "min_p": 0.25, "seed": 2**63 - 2}
    mirror.load(request_in(1, **params), 9)
    mirror.load(request_in(2, temperature=0, top_k=-1, seed=2**32 - 1), 5)
    assert mirror.send() == 14
    sampling = mirror.device.sampling
    assert sampling.temperature.tolist() == [0, pytest.approx(0.7), 0]
    assert sampling.top_k.tolist() == [0, 2**31 - 1, -1]
    assert sampling.top_p.tolist() == [0, pytest.approx(0.9), 1]
    assert sampling.min_p.tolist() == [0, 0.25, 0]
    assert [low % 2**32 + (high << 32) for low, high in sampling.seed.tolist()] == [0, 2**63 - 2, 2**32 - 1]
    assert sampling.last_token.tolist() == [0, 9, 5]
    assert mirror.send() == 0


def test_the_last_of_several_loads_of_a_slot_counts() -> None:
    mirror = Mirror(tables_of())
    tables = mirror.tables
    slot = tables.take_slot()
    tables.grow(slot, 10)
    mirror.load(request_in(slot, temperature=0.5, seed=1), 9)
    tables.release(slot)
    assert tables.take_slot() == slot
    tables.pool.allocate(5)
    tables.grow(slot, 17)
    mirror.load(request_in(slot, temperature=0.25, seed=2), 6)
    mirror.load(request_in(slot, temperature=0.25, seed=2), 8)
    assert mirror.send(slot) == 7 + 2 * 5
    assert float(mirror.device.sampling.temperature[slot]) == 0.25
    assert mirror.device.sampling.seed[slot].tolist() == [2, 0]
    assert int(mirror.device.sampling.last_token[slot]) == 8


def test_blocks_are_sent_once_and_when_their_slot_runs() -> None:
    mirror = Mirror(tables_of())
    tables = mirror.tables
    first, second = tables.take_slot(), tables.take_slot()
    for slot in (first, second):
        tables.grow(slot, 9)
        mirror.load(request_in(slot), 9)
    assert mirror.send(first) == 14 + 2 * 3, "parameters of both, blocks of the one that runs"
    assert mirror.send(first) == 0
    assert mirror.send(first, second) == 2 * 3
    tables.grow(first, 13)
    assert mirror.send(second) == 0
    tables.grow(second, 21)
    assert mirror.send(second, first) == 2 * (1 + 3)
    tables.release(first)
    assert tables.take_slot() == first
    tables.grow(first, 2)
    mirror.load(request_in(first), 9)
    assert mirror.send(first) == 7 + 2 * 1, "shorter than before"


@pytest.mark.parametrize("room", [224, 512])
def test_changes_and_sections_that_do_not_fit_the_buffer_together(make: Any, room: int) -> None:
    model = small()
    prompts = [[9 + row, *range(20, 38)] for row in range(5)]
    want = [own_tokens(model, prompt, 2) for prompt in prompts]
    engine = make(model, max_num_seqs=5, max_num_batched_tokens=48, max_prefill_tokens=48)
    runner = runner_of(engine)
    runner._sent = [sent[:room] for sent in runner._sent]
    runner._mixed_sizes = []  # the room there is always suffices for these
    assert tokens_of(engine.generate(prompts, greedy(2))) == want


# ---- without


def test_fuse_off_falls_back(make: Any) -> None:
    model = small()
    prompts = [[5, 6, 7], [8] * 14]
    engine = make(model, fuse=False)
    assert engine._paged_model.fused is None
    assert type(engine._runner) is ModelRunner
    assert tokens_of(engine.generate(prompts, same_as_own(5, 2))) == [own_tokens(model, p, 5) for p in prompts]


def test_a_model_of_another_structure_says_why_it_is_slower(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = build("gpt2").to(DEVICE)
    engine = make(model)
    assert "GPT2LMHeadModel runs without fused kernels, and slower: it has no decoder layers" in caplog.text
    assert type(engine._runner) is ModelRunner
    assert engine.generate([[5, 6, 7]], same_as_own(5, 2))[0].token_ids == own_tokens(model, [5, 6, 7], 5)


# ---- all together


@pytest.mark.parametrize("seed", range(2))
def test_random_mixes_get_the_tokens_of_the_reference_backend(make: Any, seed: int) -> None:
    rng = random.Random(seed)
    plain = make(attention_backend="reference", max_num_seqs=8)
    engine = make(num_blocks=14, max_model_len=36, max_num_batched_tokens=10, max_num_seqs=5)
    runner_of(engine)._mixed_sizes = [[], [(0, 48), (2, 20), (5, 48)]][seed]
    family = [rng.randrange(3, 128) for _ in range(16)]
    asked: dict[str, tuple[list[int], SamplingParams]] = {}
    got: dict[str, dict[int, list[int]]] = {}
    ends: dict[str, list[str | None]] = {}

    def step() -> None:
        for output in engine.step():
            got[output.request_id].setdefault(output.index, []).extend(output.token_ids)
            if output.finish_reason:
                ends.setdefault(output.request_id, []).append(output.finish_reason)
        engine.tables.check()

    for _ in range(10):
        prompt = [*family[: rng.randint(0, 16)], rng.randrange(3, 128)]
        length = rng.randint(1, 7)
        stops = {"stop_token_ids": rng.sample(range(128), 40), "min_tokens": rng.randint(0, length)}
        kind: dict[str, Any] = rng.choice([{}, stops, stops, {"n": 2}, {"beam_width": 2, "ignore_eos": False}])
        params = greedy(length, **kind)
        request_id = engine.add_request(prompt, params)
        asked[request_id], got[request_id] = (prompt, params), {}
        for _ in range(rng.randint(0, 3)):
            step()
        if rng.random() < 0.15:
            engine.abort(request_id)
    while engine.has_work:
        step()
    assert ends.keys() == asked.keys()
    wants = plain.generate([prompt for prompt, _ in asked.values()], [params for _, params in asked.values()])
    for request_id, want in zip(asked, wants, strict=True):
        for index, tokens in got[request_id].items():
            whole = (want.samples or (want,))[index].token_ids
            assert tokens == (whole[: len(tokens)] if "abort" in ends[request_id] else whole)
