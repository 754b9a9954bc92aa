"""Chat messages to prompt tokens, through the tokenizer's own template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from paged_backend.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_token_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of the messages (`role`, `content`) followed by the start of the assistant's turn.

    Raises `InvalidArgument` when the tokenizer has no chat template or the template refuses the messages.
    """
    import jinja2

    if not tokenizer.chat_template:
        raise InvalidArgument(
            "messages", list(messages), "this model's tokenizer has no chat template; send a plain prompt"
        )
    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise InvalidArgument("messages", list(messages), f"the chat template refuses them: {error}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids  # the template has them already
    return ids
