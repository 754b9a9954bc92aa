"""Pipelines and text streamers, which come to generate() their own way."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from transformers import TextIteratorStreamer, TextStreamer, pipeline

from hf_integration import stats
from tests.tiny import build


def test_pipeline(make_patched: Any, tokenizer: Any) -> None:
    texts = ["w5 w6 w7", "w9 w10 w11 w12 w13", "w20"]
    chats = [[{"role": "user", "content": text}] for text in texts]
    plain, model = build(), make_patched(strict=True)
    for batch_size, inputs in ((1, texts), (3, texts), (3, chats)):
        arguments = {"batch_size": batch_size, "max_new_tokens": 8, "do_sample": False}
        want, got = (
            pipeline("text-generation", model=each, tokenizer=tokenizer, device="cpu")(inputs, **arguments)
            for each in (plain, model)
        )
        assert got == want
    assert stats(model).served == 3 + 1 + 1


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_text_iterator_streamer(make_patched: Any, tokenizer: Any, skip_prompt: bool) -> None:
    inputs = tokenizer("w5 w6 w7", return_tensors="pt")
    texts = []
    for model in (build(), make_patched(strict=True)):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt, timeout=60)
        thread = threading.Thread(target=model.generate, kwargs=dict(**inputs, streamer=streamer, max_new_tokens=12))
        thread.start()
        texts.append(list(streamer))
        thread.join()
    assert texts[0] == texts[1]
    assert len(texts[1]) > 6, "text must come in pieces"


def test_text_streamer_refuses_a_batch_as_before(make_patched: Any, tokenizer: Any) -> None:
    inputs = tokenizer(["w5 w6", "w7 w8"], return_tensors="pt")
    with pytest.raises(ValueError, match="batch size 1"):
        make_patched(strict=True).generate(**inputs, streamer=TextStreamer(tokenizer), max_new_tokens=2)
