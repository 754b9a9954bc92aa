"""What an engine's process and its owner tell each other, pickled, over a private pipe.

The owner first sends an `EngineConfig` and is answered `Loaded`. Then it sends the commands below; its end of file
means close. It is sent `Outputs`, `Families` and, at most once, the exception that ended the engine; log records at any
time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from paged_backend.request import RequestOptions, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from prometheus_client import Metric

    from paged_backend.intake import Prompt


class Loaded(NamedTuple):
    """The engine is there, or `error` is why it could not be made."""

    error: Exception | None


class Submit(NamedTuple):
    """Run a request; whatever is wrong with it is told by its last output."""

    request_id: str
    prompt: Prompt
    params: SamplingParams | None
    options: RequestOptions | None
    arrival_time: float
    """`time.monotonic()` seconds, which all processes share."""


class Abort(NamedTuple):
    """End these requests."""

    request_ids: list[str]


class Collect(NamedTuple):
    """Send `Families`."""


class Families(NamedTuple):
    """The engine's Prometheus metric families."""

    families: list[Metric]


class Outputs(NamedTuple):
    """The outputs of a step. Those in columns say only what is new since the output before of the same sequence."""

    request_ids: list[str]
    indices: list[int]
    texts: list[str]
    token_ids: list[list[int]]
    whole: list[RequestOutput]
    """Of any request, these come after those in columns."""


_NOTHING: tuple[str, list[int]] = ("", [])


class Packer:
    """Makes `Outputs`: pickling 256 whole outputs takes several times as long as 256 rows of columns."""

    def __init__(self, interval: int = 1) -> None:
        """`interval`: tokens that the outputs of a sequence bring at least, but for its first and last."""
        self._interval = interval
        self._begun: dict[str, dict[int, tuple[str, list[int]]]] = {}
        """Sequences of requests that have not ended, of which a whole output was sent: what is held back of them."""

    def pack(self, outputs: Sequence[RequestOutput]) -> Outputs:
        """Outputs that come later in `outputs` also come later out of `unpack`, for each request. Those of one sequence
        that would be rows of columns become one row.
        """
        ids, indices, texts, token_ids, whole = packed = Outputs([], [], [], [], [])
        rows: dict[tuple[str, int], None] = {}
        for output in outputs:
            begun, index = self._begun.get(output.request_id, {}), output.index
            if index in begun:
                text, tokens = begun[index]
                output.text, output.token_ids = text + output.text, tokens + output.token_ids
                if output.finish_reason is None and output.logprobs is None:
                    begun[index] = output.text, output.token_ids
                    rows[output.request_id, index] = None
                    continue
                begun[index] = _NOTHING
            if output.error is not None:
                output.error = portable(output.error)
            whole.append(output)
        for request_id, index in rows:
            text, tokens = self._begun[request_id][index]
            if len(tokens) >= self._interval:
                ids.append(request_id)
                indices.append(index)
                texts.append(text)
                token_ids.append(tokens)
                self._begun[request_id][index] = _NOTHING
        for output in whole:  # not before: rows would overtake the first whole output
            if output.finished:
                self._begun.pop(output.request_id, None)
            else:
                self._begun.setdefault(output.request_id, {}).setdefault(output.index, _NOTHING)
        return packed


class Unpacker:
    """Takes `Outputs` apart."""

    def __init__(self) -> None:
        self._latest: dict[str, dict[int, list[Any]]] = {}
        """The fields of the latest output of each sequence."""

    def unpack(self, packed: Outputs) -> list[RequestOutput]:
        """What was packed."""
        outputs = []
        *columns, whole = packed
        for request_id, index, text, token_ids in zip(*columns, strict=True):
            fields = self._latest[request_id][index]
            fields[_TEXT], fields[_TOKEN_IDS] = text, token_ids
            fields[_NUM_OUTPUT_TOKENS] += len(token_ids)
            outputs.append(RequestOutput(*fields))
        for output in whole:
            if output.finished:
                self._latest.pop(output.request_id, None)
            else:
                fields = list(_fields(output))
                fields[_PROMPT_LOGPROBS] = None  # these come once
                self._latest.setdefault(output.request_id, {})[output.index] = fields
        return outputs + whole


_NAMES = [field.name for field in dataclasses.fields(RequestOutput)]
_TEXT, _TOKEN_IDS, _NUM_OUTPUT_TOKENS = map(_NAMES.index, ("text", "token_ids", "num_output_tokens"))
_PROMPT_LOGPROBS = _NAMES.index("prompt_logprobs")
_fields = operator.attrgetter(*_NAMES)


def portable(error: Exception) -> Exception:
    """`error` if it can be pickled and the other process knows its type; else its nearest known base, or a
    RuntimeError, with its text. So unpickling one imports nothing: torch's errors would take torch along.
    """
    known = next(kind for kind in type(error).__mro__ if kind.__module__ in ("builtins", "paged_backend.errors"))
    with contextlib.suppress(Exception):
        made = error if known is type(error) else known(str(error))
        if known is not Exception or made is error:
            pickle.loads(pickle.dumps(made))
            assert isinstance(made, Exception)
            return made
    return RuntimeError(str(error))
