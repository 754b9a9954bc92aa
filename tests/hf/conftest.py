"""Patched models that are unpatched again, and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_integration import patch, unpatch
from tests.tiny import Pair, build


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make_patched() -> Iterator[Callable[..., PreTrainedModel]]:
    """`make_patched(model, **config)`; what it patched is unpatched at the end."""
    models: list[PreTrainedModel] = []

    def make(model: PreTrainedModel | None = None, **config: Any) -> PreTrainedModel:
        models.append(patch(build() if model is None else model, **({"num_blocks": 512} | config)))
        return models[-1]

    yield make
    for model in models:
        unpatch(model)


@pytest.fixture(scope="module")
def llama() -> Iterator[Pair]:
    """One strict pair for a whole module: it cannot fall back unseen."""
    paged = patch(build(), strict=True, num_blocks=512)
    yield Pair(build(), paged)
    unpatch(paged)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word for every id."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    # "abcdef" is a word that transformers' stop-string search needs to exist.
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "abcdef": 4} | {f"w{i}": i for i in range(5, 128)}
    tokens = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
        model_input_names=["input_ids", "attention_mask"],
    )
