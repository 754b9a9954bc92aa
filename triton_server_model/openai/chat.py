"""`/v1/chat/completions`: the next message of a chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from triton_server_model.openai.client import Inputs, Output, Response
from triton_server_model.openai.schemas import ChatRequest
from triton_server_model.openai.tools import parser


class Chat:
    """The answer to one request."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, request: ChatRequest) -> None:
        self.request = request
        self.fields = {"text_input": "messages", "tenant": "user"}
        if request.forms:
            self.fields["structured_outputs"] = request.forms[0]
        self._parsers = [parser(request) for _ in range(request.n)]
        self._begun = set[int]()

    def inputs(self) -> list[Inputs]:
        """What to ask the model for."""
        request = self.request
        messages = [message.model_dump(exclude_none=True) for message in request.messages]
        inputs = request.inputs() | {"messages": json.dumps(messages)}
        if request.chat_template_kwargs:
            inputs["chat_template_kwargs"] = json.dumps(request.chat_template_kwargs)
        if request.tools and request.tool_choice.type != "none":
            inputs["tools"] = json.dumps([tool.model_dump(exclude_none=True) for tool in request.tools])
        return [inputs]

    def chunks(self, number: int, response: Response) -> Iterator[dict[str, Any]]:
        """Choices with what came."""
        for output in response.outputs:
            index = output.index
            if index not in self._begun:
                self._begun.add(index)
                yield _chunk(index, {"role": "assistant", "content": ""})
            logprobs = self._logprobs(output)
            for delta in self._parsers[index].feed(output.text, end=output.finish_reason is not None):
                yield _chunk(index, delta, logprobs)
                logprobs = None
            if logprobs and logprobs["content"]:
                yield _chunk(index, {"content": ""}, logprobs)
            if output.finish_reason is not None:
                yield _chunk(index, {}, finish_reason=self._reason(output))

    def choices(self, number: int, response: Response) -> Iterator[dict[str, Any]]:
        """Choices of the whole answer."""
        for output in response.outputs:
            deltas = list(self._parsers[output.index].feed(output.text, end=True))
            calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
            message: dict[str, Any] = {"role": "assistant", "refusal": None}
            message["content"] = "".join(delta.get("content", "") for delta in deltas) or (None if calls else "")
            if calls:
                message["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in calls]
            yield {
                "index": output.index,
                "message": message,
                "logprobs": self._logprobs(output),
                "finish_reason": self._reason(output),
            }

    def _reason(self, output: Output) -> str | None:
        chosen = self._parsers[output.index].calls and self.request.tool_choice.function is None
        return "tool_calls" if chosen and output.finish_reason == "stop" else output.finish_reason

    def _logprobs(self, output: Output) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        content = []
        for chosen, *others in output.logprobs:
            likeliest = sorted([chosen, *others], key=itemgetter("rank"))[: self.request.top_logprobs]
            content.append(_token(chosen) | {"top_logprobs": [_token(token) for token in likeliest]})
        return {"content": content, "refusal": None}


def _token(token: dict[str, Any]) -> dict[str, Any]:
    text = token["decoded_token"]
    # Part of a character is U+FFFD in the text, and its bytes are not known.
    return {"token": text, "logprob": token["logprob"], "bytes": None if "\ufffd" in text else list(text.encode())}


def _chunk(
    index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
