"""`/v1/completions`: text that goes on from prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from triton_server_model.openai.client import Inputs, Output, Response
from triton_server_model.openai.schemas import CompletionRequest


class Completion:
    """The answer to one request."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl-"
    fields: ClassVar[Mapping[str, str]] = {"text_input": "prompt", "prompt_token_ids": "prompt"}

    def __init__(self, request: CompletionRequest) -> None:
        self.request = request
        self._lengths: dict[int, int] = {}
        """Characters of each choice so far."""

    def inputs(self) -> list[Inputs]:
        """What to ask the model for, for each prompt."""
        common = self.request.inputs()
        return [
            common | ({"text_input": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt})
            for prompt in self.request.prompt
        ]

    def chunks(self, number: int, response: Response) -> Iterator[dict[str, Any]]:
        """Choices with what came for the prompt of that number."""
        for index, output in enumerate(response.outputs, number * self.request.n):
            start = self._lengths.get(index)
            echo = self.request.prompt[number] if self.request.echo and start is None else ""
            if echo or output.text or output.logprobs or output.finish_reason:
                self._lengths[index] = (start or 0) + len(output.text)
                yield {
                    "index": index,
                    "text": f"{echo}{output.text}",
                    "logprobs": _logprobs(output, start or 0) if self.request.logprobs is not None else None,
                    "finish_reason": output.finish_reason,
                }

    choices = chunks
    """A whole answer is one chunk."""


def _logprobs(output: Output, offset: int) -> dict[str, Any]:
    tokens = [likeliest[0]["decoded_token"] for likeliest in output.logprobs]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [likeliest[0]["logprob"] for likeliest in output.logprobs],
        "top_logprobs": [
            {each["decoded_token"]: each["logprob"] for each in likeliest} for likeliest in output.logprobs
        ],
        "text_offset": offsets,
    }
