"""What clients of TensorRT-LLM's Triton models send, in the words of our own model. Pure; knows no Triton."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from paged_backend.errors import InvalidArgument
from triton_server_model.protocol import decoded

_SCALARS = {
    "TYPE_STRING": ("text_input", "guided_decoding_guide_type", "guided_decoding_guide"),
    "TYPE_BOOL": (
        *("stream", "exclude_input_in_output", "return_log_probs", "return_num_input_tokens"),
        *("return_num_output_tokens", "return_context_logits", "return_generation_logits", "return_perf_metrics"),
        "use_draft_logits",
    ),
    "TYPE_INT32": (
        *("max_tokens", "min_tokens", "min_length", "top_k", "end_id", "pad_id", "beam_width"),
        *("num_return_sequences", "num_draft_tokens", "prompt_vocab_size"),
    ),
    "TYPE_UINT64": ("seed", "random_seed", "lora_task_id"),
    "TYPE_FP32": (
        *("temperature", "top_p", "length_penalty", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    ),
}
_LISTS = {
    "TYPE_STRING": ("stop_words", "bad_words", "embedding_bias_words"),
    "TYPE_FP32": ("embedding_bias_weights",),
}
INPUTS: list[dict[str, Any]] = [
    {"name": name, "data_type": kind, "dims": dims, "optional": name != "text_input"}
    for table, dims in ((_SCALARS, [1]), (_LISTS, [-1]))
    for kind, names in table.items()
    for name in names
]
OUTPUTS: list[dict[str, Any]] = [
    {"name": "text_output", "data_type": "TYPE_STRING", "dims": [-1]},
    {"name": "cum_log_probs", "data_type": "TYPE_FP32", "dims": [-1]},
    {"name": "output_log_probs", "data_type": "TYPE_FP32", "dims": [-1, -1]},
    {"name": "batch_index", "data_type": "TYPE_INT32", "dims": [1]},
    {"name": "sequence_index", "data_type": "TYPE_INT32", "dims": [1]},
    {"name": "num_input_tokens", "data_type": "TYPE_INT32", "dims": [1]},
    {"name": "num_output_tokens", "data_type": "TYPE_INT32", "dims": [1]},
]
_LIST_NAMES = {name for names in _LISTS.values() for name in names}
_OWN = ("text_input", "stream", "exclude_input_in_output", "return_log_probs")
"""Inputs that `paged_llm` is not sent as they are."""

Tensors = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Question:
    """One request, as `paged_llm` understands it."""

    prompt: str
    fields: dict[str, Any]
    """Its `sampling_parameters`."""
    stream: bool
    """Send text as it comes, not once at the end; beams only come then."""
    prefix: str
    """What the answer begins with: the prompt, or nothing."""
    beams: bool
    """Answer with all texts in one response; else each has its own."""


def translate(inputs: Mapping[str, npt.NDArray[Any]]) -> Question:
    """Read the tensors of one request, each a batch of one. Raises `InvalidArgument` for bad input.

    What `paged_llm` knows by the same name, or refuses, is left to it.
    """
    values = {name: _value(name, array.ravel()) for name, array in inputs.items()}
    if values.get("max_tokens", 0) < 1:
        raise InvalidArgument("max_tokens", values.get("max_tokens"), "required; must be at least 1")
    fields = {name: value for name, value in values.items() if name not in _OWN}
    beams = fields.get("beam_width", 1) > 1
    if beams:
        fields = {"num_return_sequences": fields["beam_width"], "length_penalty": 0.0} | fields
    elif not (fields.get("top_k") or fields.get("top_p")):
        fields["temperature"] = 0.0  # TensorRT-LLM is greedy unless asked for one of the two
    if not fields.get("top_p"):
        fields.pop("top_p", None)
    if values.get("stop_words"):
        fields["include_stop_str_in_output"] = True
    if values.get("return_log_probs"):
        fields["return_cumulative_logprob"] = True
        if not beams:
            fields |= {"logprobs": 0, "return_logprobs": True}
    fields |= {"stream": True, "exclude_input_in_output": True}
    stream = values.get("stream", False)
    prefix = "" if stream or values.get("exclude_input_in_output") else values["text_input"]
    return Question(values["text_input"], fields, stream and not beams, prefix, beams)


def _value(name: str, elements: npt.NDArray[Any]) -> Any:
    values = elements.tolist()
    if elements.dtype == np.float32:
        values = [float(str(element)) for element in elements]  # 0.1, not 0.10000000149
    elif elements.dtype == np.object_:
        values = [decoded(name, element) for element in values]
    return [value for value in values if value != ""] if name in _LIST_NAMES else values[0]


@dataclass(slots=True)
class _Sequence:
    """What is to be sent of one output."""

    text: str
    num_tokens: int = 0
    log_probs: list[float] = field(default_factory=list)
    cum_log_prob: float = 0.0


class Answer:
    """Turns what `paged_llm` answers to one question into TensorRT-LLM's responses."""

    def __init__(self, question: Question) -> None:
        self._question = question
        self._sequences: list[_Sequence] = []
        self._last: Mapping[str, list[Any]] = {}

    def add(self, outputs: Mapping[str, list[Any]]) -> None:
        """Another response of `paged_llm`."""
        self._last = outputs
        if not self._sequences:
            self._sequences = [_Sequence(self._question.prefix) for _ in outputs["text_output"]]
        for index, sequence in enumerate(self._sequences):
            sequence.text += outputs["text_output"][index]
            if "num_output_tokens" in outputs:
                sequence.num_tokens += outputs["num_output_tokens"][index]
            if "logprobs" in outputs:
                tokens = json.loads(outputs["logprobs"][index]) or ()  # null where the sampling has none
                sequence.log_probs += [next(iter(token.values()))["logprob"] for token in tokens]  # its own is first
            if "cumulative_logprob" in outputs:
                sequence.cum_log_prob = outputs["cumulative_logprob"][index]

    def take(self, *, ended: bool) -> list[Tensors]:
        """The tensors, by name, of each response that is to be sent now; one at least if all has `ended`."""
        if not (ended or self._question.stream):
            return []
        groups = [[index] for index, sequence in enumerate(self._sequences) if self._has_news(sequence, ended)]
        if self._question.beams:
            groups = [list(range(len(self._sequences)))]
        return [self._tensors(group) for group in groups or [[0]] * ended]

    def _has_news(self, sequence: _Sequence, ended: bool) -> bool:
        if not self._question.stream:
            return True
        return bool(sequence.text or (ended and (sequence.num_tokens or sequence.log_probs)))

    def _tensors(self, group: list[int]) -> Tensors:
        sequences = [self._sequences[index] for index in group]
        tensors: Tensors = {
            "text_output": np.array([sequence.text.encode() for sequence in sequences], dtype=np.object_),
            "batch_index": np.zeros((1, 1), dtype=np.int32),
            "sequence_index": np.array([[group[0]]], dtype=np.int32),
        }
        if "cumulative_logprob" in self._last:
            tensors["cum_log_probs"] = np.array([[s.cum_log_prob for s in sequences]], dtype=np.float32)
        if "logprobs" in self._last:
            tensors["output_log_probs"] = np.array([[s.log_probs for s in sequences]], dtype=np.float32)
        if "num_input_tokens" in self._last:
            tensors["num_input_tokens"] = np.array([self._last["num_input_tokens"]], dtype=np.int32)
        if "num_output_tokens" in self._last:
            tensors["num_output_tokens"] = np.array([[sum(s.num_tokens for s in sequences)]], dtype=np.int32)
        for sequence in sequences:
            sequence.text, sequence.num_tokens, sequence.log_probs = "", 0, []
        return tensors
