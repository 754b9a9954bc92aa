"""Chat messages to prompt tokens, through the tokenizer's own template."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paged_backend.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Chat:
    """A prompt that is a conversation; the model's turn is next."""

    messages: Sequence[Mapping[str, Any]]
    """Each with `role` and `content`, and whatever else the template reads."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """Functions that the model may call, as JSON schemas."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as `enable_thinking`."""


def chat_text(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str:
    """The prompt with all its special tokens, up to the start of the assistant's turn.

    Raises `InvalidArgument` when the tokenizer has no chat template, the template refuses the messages, or
    `chat_template_kwargs` would change more than its variables.
    """
    if not tokenizer.chat_template:
        raise InvalidArgument(
            "messages", chat.messages, "this model's tokenizer has no chat template; send a plain prompt"
        )
    for name in chat.chat_template_kwargs:
        if name in inspect.signature(tokenizer.apply_chat_template).parameters:  # among them another template
            raise InvalidArgument("chat_template_kwargs", name, "must be a variable of the template's own")
    try:
        text: str = tokenizer.apply_chat_template(
            list(chat.messages),
            tools=None if chat.tools is None else list(chat.tools),
            add_generation_prompt=True,
            tokenize=False,
            **chat.chat_template_kwargs,
        )
    except Exception as error:  # a template is a program, and may fail on its input in any way
        raise InvalidArgument("messages", chat.messages, f"the chat template refuses them: {error}") from error
    return text


def chat_token_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of `chat_text`. Raises as that does."""
    # The template has the special tokens already.
    ids: list[int] = tokenizer(chat_text(tokenizer, Chat(messages)), add_special_tokens=False).input_ids
    return ids
