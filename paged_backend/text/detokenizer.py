"""Tokens to text, a token at a time, never half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT = 6  # tokens of prompt decoded along with the output, so that word-start markers become spaces
_LONGEST = 8  # tokens of one character at most; more than these and its bytes are broken


class Detokenizer:
    """Incremental decoding of one request's output.

    Tokens may hold part of a character, and their text may depend on the token before (SentencePiece's leading
    space). So a window of recent tokens is decoded with and without the newest ones, and the difference is emitted
    once it does not end in an unfinished character.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> None:
        self._decode = _decoder(tokenizer, skip_special_tokens)
        self._window = list(prompt_token_ids[-_CONTEXT:])
        self._emitted = len(self._window)  # tokens of the window whose text is out

    def add(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """The text these tokens complete. `last` flushes an unfinished character as U+FFFD."""
        self._window.extend(token_ids)
        before = self._decode(self._window[: self._emitted])
        after = self._decode(self._window)
        held = len(self._window) - self._emitted
        if after.endswith("\ufffd") and held <= _LONGEST and not last:
            return ""
        if len(after) > len(before) or held > _LONGEST:
            # The window restarts at the tokens just emitted, so that its decoding stays short; not at tokens without
            # text, which would be no context for the next.
            self._window = self._window[self._emitted :]
            self._emitted = len(self._window)
        return after[len(before) :]


def _decoder(tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool) -> Callable[[list[int]], str]:
    """Its `decode`, without the detours: those of transformers take longer than the tokenizers library itself."""
    from transformers import PreTrainedTokenizerFast as Fast

    kind = type(tokenizer)
    if isinstance(tokenizer, Fast) and kind.decode is Fast.decode and kind._decode is Fast._decode:
        return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=skip_special_tokens)
    return partial(tokenizer.decode, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
