"""Beam search equals transformers': the same outputs, in the same order, with the same scores, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from paged_backend import Engine, EngineConfig, InvalidArgument, RequestOutput, SamplingParams
from tests.runner.test_parity import random_prompts
from tests.tiny import build

EOS = 2
SMALL = {"num_blocks": 62, "max_num_seqs": 5, "max_model_len": 64, "max_num_batched_tokens": 16}


def until_eos(tokens: list[int]) -> list[int]:
    """transformers fills rows up behind their end."""
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


def samples(output: RequestOutput) -> tuple[RequestOutput, ...]:
    return output.samples or (output,)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("cache", [{"num_blocks": 300}, SMALL])
@pytest.mark.parametrize(
    ("width", "how"),
    [
        (2, {}),
        (3, {"early_stopping": True, "length_penalty": 2.0}),
        (4, {"early_stopping": "never", "length_penalty": -1.0}),
        (4, {"length_penalty": 0.0}),
    ],
)
def test_equals_transformers(family: str, cache: dict[str, Any], width: int, how: dict[str, Any]) -> None:
    model = build(family)
    prompts = random_prompts(3, 25, 128, seed=width)
    want = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=14,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **how,
        )
        tokens = [until_eos(row[len(prompt) :].tolist()) for row in found.sequences]
        want.append((tokens, found.sequences_scores.tolist()))
    engine = Engine(EngineConfig(**{"block_size": 4, "max_num_seqs": 16} | cache), model=model)
    outputs = engine.generate(prompts, SamplingParams(beam_width=width, n=width, max_tokens=14, **how))
    for output, (tokens, scores) in zip(outputs, want, strict=True):
        assert [sample.token_ids for sample in samples(output)] == tokens
        assert [sample.score for sample in samples(output)] == pytest.approx(scores, rel=1e-4)
        assert [sample.index for sample in samples(output)] == list(range(width))
        assert [sample.finish_reason for sample in samples(output)] == [
            "stop" if row[-1] == EOS else "length" for row in tokens
        ]
    assert engine.stats().blocks_used == engine.stats().num_running == 0
    engine.tables.check()
    engine.close()


def test_beams_share_what_they_have_in_common() -> None:
    engine = Engine(EngineConfig(block_size=4, num_blocks=300), model=build())
    engine.add_request(list(range(3, 103)), SamplingParams(beam_width=4, max_tokens=20, ignore_eos=True))
    for _ in range(8):
        engine.step()
    assert engine.stats().num_running == 4
    assert engine.stats().blocks_used < 1.3 * 27, "25 blocks of the prompt, once, and the ends of four beams"
    engine.close()


def test_beams_beside_sampling_change_nobody_and_abort_frees_all() -> None:
    engine = Engine(EngineConfig(block_size=4, num_blocks=300), model=build())
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    beams = SamplingParams(beam_width=3, n=2, max_tokens=12)
    prompts = random_prompts(3, 20, 128)
    alone = [engine.generate([prompt], one)[0] for prompt, one in zip(prompts, (greedy, beams, greedy), strict=True)]
    together = engine.generate(prompts, [greedy, beams, greedy])
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    request_id = engine.add_request(prompts[0], beams)
    for _ in range(4):
        engine.step()
    engine.abort(request_id)
    (last,) = engine.step()
    assert (last.finish_reason, last.finished) == ("abort", True)
    assert engine.stats().blocks_used == engine.stats().num_running == engine.stats().num_waiting == 0
    engine.close()


def test_extreme_penalties_and_candidates_are_bounded() -> None:
    engine = Engine(EngineConfig(block_size=4, num_blocks=300), model=build())
    for penalty in (-10, 10):
        (output,) = engine.generate([[5, 6]], SamplingParams(beam_width=2, max_tokens=60, length_penalty=penalty))
        assert output.error is None
    with pytest.raises(InvalidArgument, match="stop_token_ids='100 tokens': at most 63 with beam_width=16"):
        engine.generate([[5]], SamplingParams(beam_width=16, stop_token_ids=range(100), ignore_eos=True))
    engine.close()


class NoWords:
    """A tokenizer that cannot decode."""

    def decode(self, token_ids: list[int], **options: Any) -> str:
        raise ValueError("no such token")


def test_beams_have_text_and_undecodable_ones_end_alone(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(vocab_size=len(byte_tokenizer))
    engine = Engine(EngineConfig(num_blocks=100), model=model, tokenizer=byte_tokenizer)
    params = SamplingParams(beam_width=3, n=2, max_tokens=9)
    (output,) = engine.generate(["hello"], params)
    for sample in output.samples:
        assert sample.text == byte_tokenizer.decode(sample.token_ids, skip_special_tokens=True)
    engine.tokenizer = NoWords()  # type: ignore[assignment]
    (bad,) = engine.generate([[5, 6]], params)
    assert (bad.finish_reason, str(bad.error)) == ("error", "no such token")
    assert engine.error is None
    engine.close()


def test_more_beams_than_the_cache_holds_are_refused() -> None:
    engine = Engine(EngineConfig(block_size=4, num_blocks=16), model=build())
    with pytest.raises(InvalidArgument, match="beam_width=4: takes up to 32 KV blocks"):
        engine.generate([[5] * 16], SamplingParams(beam_width=4, max_tokens=20))
    engine.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beam_width": 2, "n": 3}, "n=3: must be at most beam_width=2"),
        ({"beam_width": 2, "top_p": 0.5}, "top_p=0.5: must be 1.0 with beam_width > 1"),
        ({"beam_width": 2, "stop": "x"}, "stop=('x',): must be () with beam_width > 1"),
        ({"beam_width": 65}, "beam_width=65: Input should be less than or equal to 64"),
        ({"early_stopping": "soon"}, "early_stopping"),
    ],
)
def test_what_beams_cannot_do_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        SamplingParams(**fields)
    assert message in str(caught.value)
