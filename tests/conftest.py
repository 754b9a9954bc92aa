"""Models for every folder of tests: tiny random ones, and the real SmolLM2-135M-Instruct."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports a kernel
from transformers import PreTrainedTokenizerFast

from paged_backend import models
from tests import interpreter
from tests.tiny import build


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Two test processes on two cores would otherwise fight over OpenMP's spinning threads.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
        interpreter.quicken()


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that most random tokens are parts of characters."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {char: 3 + i for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for tool in tools or [] %}{{ tool['name'] }}()\n{% endfor %}"
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant{{ mood }}:",
    )


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny random llama with a byte-level tokenizer, saved as transformers saves a model."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    build("llama", vocab_size=len(byte_tokenizer), max_position_embeddings=512).save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real chat model, downloaded and converted at first use."""
    return models.pull("smollm2-135m-instruct")
