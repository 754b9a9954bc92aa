"""Detokenising and stop strings, piece by piece, against the whole."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from paged_backend.errors import InvalidArgument
from paged_backend.text.chat import chat_token_ids
from paged_backend.text.detokenizer import Detokenizer
from paged_backend.text.stop import StopStrings


def pieces(tokenizer: PreTrainedTokenizerFast, token_ids: list[int], prompt: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [detokenizer.add([token], last=i == len(token_ids) - 1) for i, token in enumerate(token_ids)]


@settings(max_examples=200, deadline=None)
@given(text=st.text(min_size=1, max_size=40))
@example(text="naïve 🙂 日本語 👩‍👩‍👧 \u200d end")
@example(text=" \ufffd kept")
def test_bytes_become_text_without_half_characters(byte_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    token_ids = byte_tokenizer(text).input_ids
    out = pieces(byte_tokenizer, token_ids, byte_tokenizer("a prompt").input_ids)
    assert "".join(out) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in out)


def test_an_unfinished_character_at_the_end_is_flushed_as_a_replacement(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    token_ids = byte_tokenizer("ok🙂").input_ids[:-1]
    assert "".join(pieces(byte_tokenizer, token_ids, [])) == "ok\ufffd"


def test_bytes_that_never_become_a_character_do_not_hold_the_text_back_for_ever(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    broken = byte_tokenizer("🙂").input_ids[0]
    letter = byte_tokenizer("x").input_ids[0]
    detokenizer = Detokenizer(byte_tokenizer, [])
    out = "".join(detokenizer.add([token]) for token in [broken, letter, letter])
    assert out == "\ufffdxx"


def test_random_tokens_of_the_real_tokenizer_equal_decoding_them_at_once(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rng = random.Random(0)
    for _ in range(30):
        prompt = tokenizer("Once upon a time").input_ids
        token_ids = [rng.randrange(len(tokenizer)) for _ in range(60)]
        whole = tokenizer.decode(prompt + token_ids, skip_special_tokens=True)
        start = tokenizer.decode(prompt, skip_special_tokens=True)
        assert start + "".join(pieces(tokenizer, token_ids, prompt)) == whole


@settings(max_examples=500, deadline=None)
@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_stop_strings_in_pieces_equal_stop_strings_at_once(text: str, stops: list[str], cuts: list[int]) -> None:
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stream, out, stopped = StopStrings(stops), "", False
    for i, (start, end) in enumerate(pairwise(bounds)):
        piece, stopped = stream.add(text[start:end], last=i == len(bounds) - 2)
        out += piece
        if stopped:
            break
    assert stopped == bool(found)
    assert out == (text[: min(found)[1]] if found else text)


def test_special_tokens_between_words_keep_the_space(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    detokenizer = Detokenizer(tokenizer, [])
    world, end = tokenizer(" world").input_ids[0], tokenizer.eos_token_id
    assert "".join(detokenizer.add([token]) for token in [world, *[end] * 20, world]) == " world world"


def test_broken_bytes_come_out_after_a_while(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    broken = byte_tokenizer("🙂").input_ids[0]
    detokenizer = Detokenizer(byte_tokenizer, [])
    pieces = [detokenizer.add([broken]) for _ in range(100)]
    assert len("".join(pieces)) > 80


def test_a_tokenizer_that_decodes_in_its_own_way_is_asked(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    class Loud(PreTrainedTokenizerFast):
        def _decode(self, *args: Any, **kwargs: Any) -> str:
            return str(super()._decode(*args, **kwargs)).upper()

    loud = Loud(tokenizer_object=byte_tokenizer.backend_tokenizer)
    assert Detokenizer(loud, []).add(byte_tokenizer("quiet").input_ids, last=True) == "QUIET"


def test_a_stop_string_may_begin_before_it_is_armed() -> None:
    stream = StopStrings(["END"])
    assert stream.add("END EN", armed=False) == ("END ", False)
    assert stream.add("D more") == ("", True)


def test_text_is_held_back_only_while_it_could_begin_a_stop_string() -> None:
    stream = StopStrings(["END"])
    assert stream.add("abc E") == ("abc ", False)
    assert stream.add("N") == ("", False)
    assert stream.add("x") == ("ENx", False)
    assert stream.add("EN") == ("", False)
    assert stream.add("D more") == ("", True)


def test_chat_messages_become_the_template(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = chat_token_ids(byte_tokenizer, [{"role": "user", "content": "hi"}])
    assert byte_tokenizer.decode(ids) == "user: hi\nassistant:"


def test_a_tokenizer_without_a_template_says_so(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    plain = byte_tokenizer.__class__(tokenizer_object=byte_tokenizer.backend_tokenizer)
    with pytest.raises(InvalidArgument, match="no chat template"):
        chat_token_ids(plain, [{"role": "user", "content": "hi"}])
