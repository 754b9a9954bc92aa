"""Greedy generate() on a patched model is generate() of transformers, token for token and pad for pad."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from hf_integration import stats
from tests.tiny import FAMILIES, Pair, build, prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, make_patched: Any) -> None:
    pair = Pair(build(family), make_patched(build(family), strict=True))
    pair.check(**prompts(5, 23, 41), max_new_tokens=24, eos_token_id=None)
    pair.check(**prompts(9), max_new_tokens=24)


def free_run(pair: Pair, inputs: dict[str, torch.Tensor], steps: int = 20) -> list[list[int]]:
    """What each row generates when nothing stops it."""
    width = inputs["input_ids"].shape[1]
    return pair.plain.generate(**inputs, max_new_tokens=steps, eos_token_id=None)[:, width:].tolist()


def test_eos_ends_a_row_and_pads_it(llama: Pair) -> None:
    inputs = prompts(5, 23, 41)
    eos = free_run(llama, inputs)[1][4]
    got = llama.check(**inputs, max_new_tokens=20, eos_token_id=eos, pad_token_id=0)
    assert got[1, 41:].tolist()[-1] == 0, "the case must have a padded row"


def test_all_rows_end_early(llama: Pair) -> None:
    inputs = prompts(5, 23)
    rows = free_run(llama, inputs)
    got = llama.check(**inputs, max_new_tokens=20, eos_token_id=[rows[0][3], rows[1][6]], pad_token_id=0)
    assert got.shape[1] < 23 + 20, "the case must end before max_new_tokens"


def test_pad_equals_eos(llama: Pair) -> None:
    inputs = prompts(5, 23, 41)
    eos = free_run(llama, inputs)[2][2]
    llama.check(**inputs, max_new_tokens=20, eos_token_id=eos, pad_token_id=eos)


def test_eos_that_no_token_can_be(llama: Pair) -> None:
    llama.check(**prompts(5, 9), max_new_tokens=6, eos_token_id=[-1], pad_token_id=0)
    llama.check(**prompts(5, 9), max_new_tokens=6, min_new_tokens=4, eos_token_id=[2, 100_000], pad_token_id=0)


@pytest.mark.parametrize("minimum", [{"min_new_tokens": 9}, {"min_length": 23 + 9}, {"min_new_tokens": 20}])
def test_minimum_holds_eos_back(llama: Pair, minimum: dict[str, int]) -> None:
    inputs = prompts(5, 23)
    eos = [row[2] for row in free_run(llama, inputs)]
    short = llama.check(**inputs, max_new_tokens=20, eos_token_id=eos, pad_token_id=0)
    longer = llama.check(**inputs, max_new_tokens=20, eos_token_id=eos, pad_token_id=0, **minimum)
    assert longer.shape[1] > short.shape[1]


def test_max_length_counts_the_padding(llama: Pair) -> None:
    assert llama.check(**prompts(5, 23), max_length=31, eos_token_id=None).shape[1] == 31


def test_one_token(llama: Pair) -> None:
    llama.check(**prompts(5, 23), max_new_tokens=1)


def test_num_return_sequences(llama: Pair) -> None:
    # transformers refuses more than one greedy sequence, but not with one top token.
    arguments = prompts(5, 9) | {"max_new_tokens": 8, "do_sample": True, "top_k": 1, "num_return_sequences": 3}
    assert llama.check(**arguments).shape[0] == 6


def test_mask_left_out_or_inferred_from_padding(llama: Pair) -> None:
    llama.check(input_ids=prompts(9, 9)["input_ids"], max_new_tokens=6)
    llama.check(input_ids=prompts(5, 9)["input_ids"], max_new_tokens=6)


def test_mask_dtypes_and_own_position_ids(llama: Pair) -> None:
    inputs = prompts(5, 9)
    mask = inputs["attention_mask"]
    llama.check(input_ids=inputs["input_ids"], attention_mask=mask.bool(), max_new_tokens=6)
    llama.check(input_ids=inputs["input_ids"], attention_mask=mask.float(), max_new_tokens=6)
    llama.check(**inputs, position_ids=(mask.cumsum(1) - 1).masked_fill(mask == 0, 1), max_new_tokens=6)


def test_input_ids_of_another_dtype(llama: Pair) -> None:
    inputs = prompts(5, 9)
    llama.check(input_ids=inputs["input_ids"].int(), attention_mask=inputs["attention_mask"], max_new_tokens=6)


def test_no_prompt_starts_from_bos(llama: Pair) -> None:
    llama.check(max_new_tokens=6)


def test_options_that_change_no_token(llama: Pair) -> None:
    llama.check(**prompts(5, 9), max_new_tokens=6, cache_implementation="dynamic", disable_compile=True)


class Columns(BaseStreamer):
    def __init__(self) -> None:
        self.puts: list[Any] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert value.device.type == "cpu"
        self.puts.append(value.tolist())

    def end(self) -> None:
        self.ended += 1


def test_streamer_gets_the_same_columns(llama: Pair) -> None:
    inputs = prompts(5, 23, 41)
    arguments = inputs | {"max_new_tokens": 12, "eos_token_id": free_run(llama, inputs)[1][4], "pad_token_id": 0}
    want, got = Columns(), Columns()
    llama.plain.generate(**arguments, streamer=want)
    llama.paged.generate(**arguments, streamer=got)
    assert got.puts == want.puts
    assert got.ended == want.ended == 1


def test_more_rows_than_the_engine_lets_wait(make_patched: Any) -> None:
    model = make_patched(strict=True, max_num_seqs=2, max_waiting=2)
    inputs = prompts(*range(3, 15))
    Pair(build(), model).check(**inputs, max_new_tokens=6, eos_token_id=None)
    assert stats(model).served == 1


def test_preemption_changes_nothing(make_patched: Any) -> None:
    model = make_patched(strict=True, num_blocks=12, block_size=4)
    Pair(build(), model).check(**prompts(9, 9, 9, 9), max_new_tokens=24, eos_token_id=None)
    assert stats(model).engine.preemptions > 0


def test_updated_weights_are_used(llama: Pair) -> None:
    inputs = prompts(17, 33) | {"max_new_tokens": 12, "eos_token_id": None}
    before = llama.check(**inputs)
    for model in (llama.plain, llama.paged):
        torch.manual_seed(11)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) * 0.05
    assert llama.check(**inputs).tolist() != before.tolist()
