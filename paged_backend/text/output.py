"""The text of one request's output as it grows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paged_backend.request import Request
from paged_backend.text.detokenizer import Detokenizer
from paged_backend.text.stop import StopStrings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def whole_text(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], token_ids: list[int], *, skip_special_tokens: bool
) -> str:
    """The text of an output that is complete."""
    return Detokenizer(tokenizer, prompt, skip_special_tokens=skip_special_tokens).add(token_ids, last=True)


class OutputText:
    """Detokeniser and stop strings of one request."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, request: Request) -> None:
        self._request, params = request, request.params
        self._detokenizer = Detokenizer(tokenizer, request.token_ids, skip_special_tokens=params.skip_special_tokens)
        self._stop = StopStrings(params.stop, include=params.include_stop_str_in_output)

    def add(self, token_ids: list[int], *, last: bool) -> tuple[str, bool]:
        """Text that may go out, and whether a stop string ended the output. `last` flushes what is held back."""
        text = self._detokenizer.add(token_ids, last=last)
        armed = self._request.num_output_tokens >= self._request.params.min_tokens
        return self._stop.add(text, last=last, armed=armed)
