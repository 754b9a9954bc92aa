"""What the engine does not do runs on the original generate: the same result, one warning that names the argument."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.utils import ModelOutput

from hf_integration import NotServed, stats
from tests.tiny import Pair, build, prompts

CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


class OwnProcessor(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return -scores


class OwnCriterion(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 15)


def interior_hole() -> torch.Tensor:
    mask = prompts(9, 9)["attention_mask"]
    mask[0, 3] = 0
    return mask


CASES: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.3},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[5], [9]]},
    "sequence_bias": {"sequence_bias": [[[5], 4.0]]},
    "suppress_tokens": {"suppress_tokens": [5, 9]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [5, 9]},
    "forced_bos_token_id": {"forced_bos_token_id": 5, "input_ids": torch.tensor([[7]]), "attention_mask": None},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.5)},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: [4, 5, 6 + row]},
    "guidance_scale": {"guidance_scale": 1.5},
    "watermarking_config": {"watermarking_config": WatermarkingConfig()},
    "typical_p": {"do_sample": True, "typical_p": 0.6},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.01},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.01},
    "top_h": {"do_sample": True, "top_h": 0.5},
    "max_time": {"max_time": 100.0},
    "stop_strings": {"stop_strings": ["w7"]},
    "logits_processor OwnProcessor": {"logits_processor": LogitsProcessorList([OwnProcessor()])},
    "logits_processor with repeated": {
        "do_sample": True,
        "temperature": 0.5,
        "logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.7)]),
    },
    "logits_processor with its own filter_value": {
        "do_sample": True,
        "top_k": 0,
        "logits_processor": LogitsProcessorList([TopPLogitsWarper(0.2, min_tokens_to_keep=5)]),
    },
    "stopping_criteria OwnCriterion": {"stopping_criteria": StoppingCriteriaList([OwnCriterion()])},
    "return_dict_in_generate": {"return_dict_in_generate": True, "output_scores": True},
    "use_cache=False": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static", "disable_compile": True},
    "attention_mask": {"attention_mask": interior_hole()},
    "position_ids": {"position_ids": torch.arange(4, 13).expand(2, 9)},
    CACHE: {CACHE: DynamicCache},
    "inputs_embeds": {"input_ids": None, "attention_mask": None, "inputs_embeds": torch.randn(2, 9, 64)},
    "max_length": {"max_new_tokens": 40},
}


@pytest.mark.parametrize("name", CASES)
def test_runs_on_the_original(name: str, make_patched: Any, tokenizer: Any) -> None:
    plain, model = build(), make_patched(max_model_len=32)
    arguments = prompts(9, 9) | {"max_new_tokens": 8} | CASES[name]
    if "stop_strings" in arguments:
        arguments["tokenizer"] = tokenizer

    def run(which: Any) -> tuple[list[list[int]], Any]:
        torch.manual_seed(1)
        own = {CACHE: DynamicCache(config=plain.config)} if CACHE in arguments else {}
        output = which.generate(**arguments | own)
        if isinstance(output, ModelOutput):
            return output.sequences.tolist(), output.scores
        return output.tolist(), None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = run(plain)
    for call in (1, 2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = run(model)
        ours = [warning for warning in caught if "paged generate" in str(warning.message)]
        assert got[0] == want[0]
        assert want[1] is None or all(torch.equal(a, b) for a, b in zip(got[1], want[1], strict=True))
        assert len(ours) == (call == 1), "one warning for each reason"
        if ours:
            assert f"does not support {name}" in str(ours[0].message)
            assert str(ours[0].message).endswith("yet; this call ran on the original generate")
            assert ours[0].filename == __file__, "the warning points at the caller of generate()"
    assert stats(model).served == 0
    assert stats(model).fallback == 2
    (reason,) = stats(model).reasons
    assert reason.startswith(name)


def test_autocast_and_training_and_cast(make_patched: Any) -> None:
    plain, model = build(), make_patched()
    inputs = prompts(9) | {"max_new_tokens": 6}
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match=r"torch\.autocast"):
        assert model.generate(**inputs).tolist() == plain.generate(**inputs).tolist()
    plain.train(), model.train()
    with pytest.warns(UserWarning, match="training mode"):
        assert model.generate(**inputs).tolist() == plain.generate(**inputs).tolist()
    plain.eval().to(torch.bfloat16), model.eval().to(torch.bfloat16)
    with pytest.warns(UserWarning, match="moved or cast"):
        assert model.generate(**inputs).tolist() == plain.generate(**inputs).tolist()


def test_beams_and_assistants_have_their_own_loops(make_patched: Any) -> None:
    pair = Pair(build(), make_patched(strict=True))
    pair.check(**prompts(5, 9), max_new_tokens=6, num_beams=3)
    pair.check(**prompts(9), max_new_tokens=6, prompt_lookup_num_tokens=2)
    assert stats(pair.paged).served == stats(pair.paged).fallback == 0


def test_as_the_assistant_of_another_model(make_patched: Any) -> None:
    assistant, big = make_patched(), build(num_hidden_layers=3)
    inputs = prompts(9) | {"max_new_tokens": 8, "eos_token_id": None}
    with pytest.warns(UserWarning, match="assistant_model"):
        got = big.generate(**inputs, assistant_model=assistant)
    assert got.tolist() == big.generate(**inputs).tolist()


def test_strict_raises_instead(make_patched: Any) -> None:
    model = make_patched(strict=True)
    with pytest.raises(NotServed, match="repetition_penalty") as raised:
        model.generate(**prompts(9), max_new_tokens=4, repetition_penalty=1.3)
    assert raised.value.argument == "repetition_penalty"
    assert model.generate(**prompts(9), max_new_tokens=4).shape == (1, 13)
