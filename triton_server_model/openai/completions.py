"""`/v1/completions`: text that goes on from prompts."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from triton_server_model.openai.client import Inputs, Response, Token
from triton_server_model.openai.schemas import CompletionRequest


class Completion:
    """The answer to one request."""

    kind = chunk_kind = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, request: CompletionRequest) -> None:
        self.request = request
        self.fields = {"text_input": "prompt", "prompt_token_ids": "prompt", "tenant": "user"}
        self._begun: set[int] = set()
        """Choices that something was told of."""
        self._prompt_tokens: dict[int, list[Token]] = {}
        """Of the prompts that are echoed with log-probabilities."""
        self._offsets: defaultdict[int, int] = defaultdict(int)
        """Characters of the tokens of each choice so far."""

    def inputs(self) -> list[Inputs]:
        """What to ask the model for, for each prompt."""
        common = self.request.inputs()
        return [
            common | ({"text_input": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt})
            for prompt in self.request.prompt
        ]

    def chunks(self, number: int, response: Response) -> Iterator[dict[str, Any]]:
        """Choices with what came for the prompt of that number."""
        if response.prompt_logprobs:
            self._prompt_tokens[number] = self._named(number, response.prompt_logprobs)
        for output in response.outputs:
            index = number * self.request.n + output.index
            text, tokens = output.text, output.logprobs
            if not (text or tokens or output.finish_reason):
                continue
            if self.request.echo and index not in self._begun:
                text, tokens = self._echo(number) + text, self._prompt_tokens.get(number, []) + tokens
            self._begun.add(index)
            yield {
                "index": index,
                "text": text,
                "logprobs": self._logprobs(index, tokens) if self.request.logprobs is not None else None,
                "finish_reason": output.finish_reason,
            }

    choices = chunks
    """A whole answer is one chunk."""

    def _named(self, number: int, tokens: list[Token]) -> list[Token]:
        """With text for the first token, of which nothing is known: what the others leave of the prompt."""
        prompt, rest = self.request.prompt[number], _text(tokens[1:])
        first = prompt.removesuffix(rest) if isinstance(prompt, str) and prompt.endswith(rest) else ""
        return [[{"decoded_token": first, "logprob": None}], *tokens[1:]]

    def _echo(self, number: int) -> str:
        prompt = self.request.prompt[number]
        return prompt if isinstance(prompt, str) else _text(self._prompt_tokens[number])

    def _logprobs(self, index: int, tokens: list[Token]) -> dict[str, Any]:
        texts = [token[0]["decoded_token"] for token in tokens]
        ends = list(itertools.accumulate(map(len, texts), initial=self._offsets[index]))
        self._offsets[index] = ends.pop()
        return {
            "tokens": texts,
            "token_logprobs": [token[0]["logprob"] for token in tokens],
            "top_logprobs": [_likeliest(token) for token in tokens],
            "text_offset": ends,
        }


def _text(tokens: list[Token]) -> str:
    return "".join(token[0]["decoded_token"] for token in tokens)


def _likeliest(token: Token) -> dict[str, float] | None:
    """Log-probabilities by text; of several tokens with one text (parts of characters), that of the likeliest."""
    if token[0]["logprob"] is None:
        return None
    return {one["decoded_token"]: one["logprob"] for one in sorted(token, key=itemgetter("logprob"))}
