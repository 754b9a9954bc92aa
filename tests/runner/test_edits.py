"""Penalties, bias, forbidden and allowed tokens, log-probabilities: by hand, on both runners."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from paged_backend import Engine, EngineConfig, InvalidArgument, RequestOutput, SamplingParams
from paged_backend.scheduler import scheduler
from tests.tiny import build

pytest.importorskip("triton")
from paged_kernels.gpu import decode_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [[5, 6, 7, 5], [9], list(range(30, 50))]
LENGTH = 8


@pytest.fixture(params=["reference", "triton"])
def make(
    request: pytest.FixtureRequest, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Engine]]:
    """On a CPU, few programs: the interpreter takes as long for those without work as for others."""
    if DEVICE == "cpu":
        monkeypatch.setattr(decode_attention, "_programs", lambda device: 2)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = build(vocab_size=len(byte_tokenizer), **shape).to(DEVICE)
    made = []

    def make_engine(num_blocks: int = 100) -> Engine:
        fields = {"block_size": 4, "num_blocks": num_blocks, "max_num_seqs": 6, "max_num_batched_tokens": 24}
        config = EngineConfig(attention_backend=request.param, max_model_len=36, **fields)
        made.append(Engine(config, model=model, tokenizer=byte_tokenizer))
        return made[-1]

    yield make_engine
    for engine in made:
        assert engine.stats().blocks_used == 0
        engine.close()


@pytest.fixture
def engine(make: Callable[..., Engine]) -> Engine:
    return make()


def ask(engine: Engine, prompts: list[Any] = PROMPTS, **fields: Any) -> list[RequestOutput]:
    params = SamplingParams(**{"temperature": 0, "max_tokens": LENGTH, "ignore_eos": True} | fields)
    return engine.generate(prompts, params)


def own_logits(engine: Engine, tokens: list[int]) -> torch.Tensor:
    """Of the token after `tokens`, by transformers."""
    with torch.no_grad():
        return engine.model(torch.tensor([tokens], device=DEVICE), use_cache=False).logits[0, -1].double().cpu()


def by_hand(engine: Engine, prompt: list[int], change: Any) -> list[int]:
    """Greedy tokens of logits that `change(logits, output)` has changed."""
    output: list[int] = []
    for _ in range(LENGTH):
        logits = own_logits(engine, prompt + output)
        change(logits, prompt, output)
        output.append(int(logits.argmax()))
    return output


def penalties(presence: float = 0, frequency: float = 0, repetition: float = 1) -> Any:
    def change(logits: torch.Tensor, prompt: list[int], output: list[int]) -> None:
        for token in {*prompt, *output}:
            logits[token] *= repetition if logits[token] < 0 else 1 / repetition
        for token, times in Counter(output).items():
            logits[token] -= times * frequency + presence

    return change


@pytest.mark.parametrize(
    "fields",
    [{"presence": 1.5}, {"frequency": 0.7}, {"repetition": 1.8}, {"presence": -1, "frequency": 0.5, "repetition": 0.7}],
)
def test_penalties(engine: Engine, fields: dict[str, float]) -> None:
    outputs = ask(engine, **{f"{name}_penalty": value for name, value in fields.items()})
    want = [by_hand(engine, prompt, penalties(**fields)) for prompt in PROMPTS]
    assert [output.token_ids for output in outputs] == want
    assert want != [output.token_ids for output in ask(engine)]


def test_penalties_survive_preemption_and_slots_change_hands(make: Callable[..., Engine]) -> None:
    engine = make(num_blocks=9)
    fields = {"presence": 0.8, "frequency": 0.3, "repetition": 1.3}
    want = [by_hand(engine, prompt, penalties(**fields)) for prompt in PROMPTS]
    plain = [by_hand(engine, prompt, penalties()) for prompt in PROMPTS]
    for _ in range(2):
        outputs = ask(engine, **{f"{name}_penalty": value for name, value in fields.items()})
        assert [output.token_ids for output in outputs] == want
        assert [output.token_ids for output in ask(engine)] == plain
    assert engine.stats().preemptions > 0


def test_bias_allowed_and_stops_before_min_tokens(engine: Engine) -> None:
    (free,) = ask(engine, [PROMPTS[0]])
    favourite = free.token_ids[0]

    def change(logits: torch.Tensor, prompt: list[int], output: list[int]) -> None:
        allowed = [favourite, 60, 61, 62, 70, 100]
        kept = logits[allowed].clone()
        logits[:] = -math.inf
        logits[allowed] = kept
        logits[favourite] -= 3
        logits[61] += 1.25
        if len(output) < 5:
            logits[61] = -math.inf

    want = by_hand(engine, PROMPTS[0], change)
    until = next((at for at, token in enumerate(want) if token == 61), LENGTH)
    fields = {"allowed_token_ids": [favourite, 60, 61, 62, 70, 100], "logit_bias": {favourite: -3, 61: 1.25}}
    (output,) = ask(engine, [PROMPTS[0]], **fields, stop_token_ids=[61], min_tokens=5)
    assert output.token_ids == want[: until + 1]
    sampled = ask(engine, [PROMPTS[0]] * 3, temperature=5, seed=3, allowed_token_ids=[9, 11])
    assert {token for output in sampled for token in output.token_ids} == {9, 11}


def test_others_in_the_batch_are_untouched(engine: Engine) -> None:
    alone = [output.token_ids for output in ask(engine)]
    plain = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    edited = plain.model_copy(update={"allowed_token_ids": (50, 51), "repetition_penalty": 1.5, "logprobs": 2})
    outputs = engine.generate([*PROMPTS, *PROMPTS], [plain] * 3 + [edited] * 3)
    assert [output.token_ids for output in outputs[:3]] == alone
    assert {token for output in outputs[3:] for token in output.token_ids} <= {50, 51}


def test_bad_words(engine: Engine) -> None:
    """One token, and several: the last of them is forbidden where the others came."""
    letters = [engine.tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
    (free,) = ask(engine, [PROMPTS[0]], allowed_token_ids=letters)
    word = "".join(engine.tokenizer.convert_ids_to_tokens(free.token_ids))
    bad = [word[0], word[4:7]]
    banned = engine.tokenizer(bad, add_special_tokens=False).input_ids

    def change(logits: torch.Tensor, prompt: list[int], output: list[int]) -> None:
        logits[[token for token in range(len(logits)) if token not in letters]] = -math.inf
        for *start, last in banned:
            if not start or output[-len(start) :] == start:
                logits[last] = -math.inf

    (output,) = ask(engine, [PROMPTS[0]], allowed_token_ids=letters, bad_words=bad)
    assert output.token_ids == by_hand(engine, PROMPTS[0], change) != free.token_ids
    (output,) = ask(engine, [PROMPTS[0]], allowed_token_ids=letters, bad_words=[word[4:7]])
    assert word[4:7] not in output.text
    assert output.token_ids[:6] == free.token_ids[:6]


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.3, "seed": 4}, {"repetition_penalty": 1.4}])
def test_logprobs_are_of_the_models_own_logits(engine: Engine, fields: dict[str, Any]) -> None:
    for prompt, output in zip(PROMPTS, ask(engine, logprobs=3, **fields), strict=True):
        assert output.logprobs is not None
        assert len(output.logprobs) == LENGTH
        total = 0.0
        for at, (token, (own, *likeliest)) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
            want = own_logits(engine, prompt + output.token_ids[:at]).log_softmax(-1)
            best = want.topk(3)
            assert own.token_id == token
            assert own.logprob == pytest.approx(float(want[token]), abs=1e-4)
            assert own.rank == int((want > want[token] + 1e-6).sum()) + 1
            assert [found.token_id for found in likeliest] == best.indices.tolist()
            assert [found.logprob for found in likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert [found.rank for found in likeliest] == [1, 2, 3]
            assert own.text == engine.tokenizer.decode([token])
            total += own.logprob
        assert output.cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize("num_blocks", [100, 9])
def test_logprobs_of_prompts(make: Callable[..., Engine], num_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, beside others, and though what they compute is lost on the way."""
    monkeypatch.setattr(scheduler, "_MOST_SCORED", 5)
    engine = make(num_blocks)
    engine._scheduler._prefers_whole = lambda num_tokens: True
    outputs = ask(engine, [*PROMPTS, PROMPTS[2]], prompt_logprobs=2)
    plain = ask(engine)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in [*plain, plain[2]]]
    for prompt, output in zip([*PROMPTS, PROMPTS[2]], outputs, strict=True):
        assert output.prompt_logprobs is not None
        assert output.logprobs is None
        assert output.num_cached_tokens == 0
        first, *rest = output.prompt_logprobs
        assert first == []
        for at, (own, *likeliest) in enumerate(rest, start=1):
            want = own_logits(engine, prompt[:at]).log_softmax(-1)
            assert own.token_id == prompt[at]
            assert own.logprob == pytest.approx(float(want[prompt[at]]), abs=1e-4)
            assert [found.token_id for found in likeliest] == want.topk(2).indices.tolist()
    assert (engine.stats().preemptions > 0) == (num_blocks == 9)


def test_logprobs_only_for_those_who_ask(engine: Engine) -> None:
    params = [SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=count) for count in (None, 0, 2)]
    outputs = engine.generate(PROMPTS, params)
    assert outputs[0].logprobs is None
    assert outputs[0].cumulative_logprob is None
    assert [len(entry) for output in outputs[1:] for entry in output.logprobs or ()] == [1] * 4 + [3] * 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {300: 1}}, "logit_bias=300: must be a token id in 0..258"),
        ({"allowed_token_ids": [5, 259]}, "allowed_token_ids=259: must be a token id in 0..258"),
        ({"logit_bias": {5: 101}}, "logit_bias.5=101: Input should be less than or equal to 100"),
        ({"repetition_penalty": 0}, "repetition_penalty=0: Input should be greater than 0"),
        ({"logprobs": 21}, "logprobs=21: Input should be less than or equal to 20"),
    ],
)
def test_bad_values(engine: Engine, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        ask(engine, **fields)


def test_nothing_allowed_ends_that_request_alone(engine: Engine) -> None:
    nothing = SamplingParams(temperature=0, allowed_token_ids=(61,), stop_token_ids=(61,), min_tokens=2, max_tokens=4)
    fine = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    outputs = engine.generate(PROMPTS, [fine, nothing, fine])
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert "no token is allowed" in str(outputs[1].error)
