"""What generate() prepared, as the engine's words: prompts without padding, and `SamplingParams`.

The prepared processors and criteria are read, not generate()'s arguments: they are what transformers would run, after
every default and override. The lists of what is served are allow-lists; anything else raises `NotServed`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.generation import logits_process, stopping_criteria
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from paged_backend.errors import PagedBackendError
from paged_backend.request import SamplingParams

# In the order the engine applies them; transformers' is the same.
_PROCESSORS = (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
)

# The argument of generate() behind each class that is not served; a class missing here is the caller's own.
_ARGUMENTS = {
    logits_process.EncoderNoRepeatNGramLogitsProcessor: "encoder_no_repeat_ngram_size",
    logits_process.EncoderRepetitionPenaltyLogitsProcessor: "encoder_repetition_penalty",
    logits_process.EpsilonLogitsWarper: "epsilon_cutoff",
    logits_process.EtaLogitsWarper: "eta_cutoff",
    logits_process.ExponentialDecayLengthPenalty: "exponential_decay_length_penalty",
    logits_process.ForcedBOSTokenLogitsProcessor: "forced_bos_token_id",
    logits_process.ForcedEOSTokenLogitsProcessor: "forced_eos_token_id",
    logits_process.InfNanRemoveLogitsProcessor: "remove_invalid_values",
    logits_process.LogitNormalization: "renormalize_logits",
    logits_process.NoBadWordsLogitsProcessor: "bad_words_ids",
    logits_process.NoRepeatNGramLogitsProcessor: "no_repeat_ngram_size",
    logits_process.PrefixConstrainedLogitsProcessor: "prefix_allowed_tokens_fn",
    logits_process.RepetitionPenaltyLogitsProcessor: "repetition_penalty",
    logits_process.SequenceBiasLogitsProcessor: "sequence_bias",
    logits_process.SuppressTokensAtBeginLogitsProcessor: "begin_suppress_tokens",
    logits_process.SuppressTokensLogitsProcessor: "suppress_tokens",
    logits_process.SynthIDTextWatermarkLogitsProcessor: "watermarking_config",
    logits_process.TopHLogitsWarper: "top_h",
    logits_process.TypicalLogitsWarper: "typical_p",
    logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor: "guidance_scale",
    logits_process.WatermarkLogitsProcessor: "watermarking_config",
    stopping_criteria.ConfidenceCriteria: "assistant_confidence_threshold",
    stopping_criteria.MaxTimeCriteria: "max_time",
    stopping_criteria.StopStringCriteria: "stop_strings",
}

_CACHES = ("cache", "past_key_values")  # the same: transformers 5.24 renamed it
# Arguments of the decode loop that the engine replaces or that change no token.
_MODEL_KWARGS = {
    *_CACHES,
    "attention_mask",
    "position_ids",
    "use_cache",
    "logits_to_keep",
    "tokenizer",
    "assistant_tokenizer",
}
_OUTPUTS = ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions", "output_hidden_states")


class NotServed(PagedBackendError, NotImplementedError):
    """The engine does not do what this call of generate() asks; `argument` names it."""

    def __init__(self, argument: str) -> None:
        super().__init__(f"paged generate does not support {argument} yet")
        self.argument = argument


def check_call(config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]) -> None:
    """Raises `NotServed` when the call needs the decode loop's own cache, outputs or inputs."""
    if config.is_assistant:
        raise NotServed("being the assistant_model of another model")
    if synced_gpus:
        raise NotServed("synced_gpus")
    unknown = sorted(name for name in model_kwargs.keys() - _MODEL_KWARGS if model_kwargs[name] is not None)
    outputs = [name for name in _OUTPUTS if getattr(config, name)]
    for name in [*outputs, *unknown]:
        raise NotServed(name)
    if config.cache_implementation not in (None, "dynamic"):
        raise NotServed("cache_implementation")
    if not model_kwargs.get("use_cache"):
        raise NotServed("use_cache=False")
    for name in _CACHES:
        cache = model_kwargs.get(name)
        # The cache that generate() made for this call is empty, and nobody else will read it.
        if cache is not None and (type(cache) is not DynamicCache or getattr(cache, "_is_user_defined", False)):
            raise NotServed(name)


def unpadded_prompts(input_ids: torch.Tensor, model_kwargs: dict[str, Any]) -> list[list[int]]:
    """The token ids of each row of `input_ids` (rows, width) without its left padding.

    Raises `NotServed` for a mask that is not pure left padding, and for positions that do not count from the first
    token.
    """
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    ids = input_ids.cpu()
    real = torch.ones_like(ids, dtype=torch.bool)
    if mask is not None:
        if mask.shape != ids.shape:
            raise NotServed("attention_mask of another shape than input_ids")
        real = mask.cpu().bool()
        if (real != mask.cpu()).any() or (real[:, :-1] & ~real[:, 1:]).any() or not real[:, -1:].all():
            raise NotServed("attention_mask other than left padding")
    if positions is not None:
        counted = real.cumsum(dim=1) - 1
        if positions.dim() != 2 or positions.shape[1] != ids.shape[1]:
            raise NotServed("position_ids of another shape than input_ids")
        if ((positions.cpu() != counted) & real).any():
            raise NotServed("position_ids other than those of attention_mask")
    return [row[keep].tolist() for row, keep in zip(ids, real, strict=True)]


def sampling_params(processors: list[Any], criteria: list[Any], do_sample: bool, width: int) -> SamplingParams:
    """`SamplingParams` that do what these processors and criteria do to a prompt of `width` tokens, padding counted.

    Raises `NotServed` naming the argument of generate() that made a processor or criterion the engine has no like of.
    """
    for criterion in criteria:
        if type(criterion) not in (MaxLengthCriteria, EosTokenCriteria):
            raise NotServed(_ARGUMENTS.get(type(criterion), f"stopping_criteria {type(criterion).__name__}"))
    lengths = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
    if not lengths:
        raise NotServed("stopping_criteria without a max_length")
    eos = [criterion.eos_token_id.tolist() for criterion in criteria if type(criterion) is EosTokenCriteria]
    # A negative id is transformers' way to say that nothing ends a row.
    stop_token_ids = {token for ids in eos for token in ids if token >= 0}
    if len(stop_token_ids) > 256:
        raise NotServed("more than 256 ids in eos_token_id")

    for processor in processors:
        if type(processor) not in _PROCESSORS:
            raise NotServed(_ARGUMENTS.get(type(processor), f"logits_processor {type(processor).__name__}"))
    order = [_PROCESSORS.index(type(processor)) for processor in processors]
    if order != sorted(set(order)):
        raise NotServed("logits_processor with repeated or reordered temperature, top_k, top_p, min_p or min_length")

    # transformers generates at least one token, even when max_length is already reached.
    max_tokens = max(1, min(lengths) - width)
    min_tokens, temperature, top_k, top_p, min_p = 0, 1.0, 0, 1.0, 0.0
    for processor in processors:
        match processor:
            case MinLengthLogitsProcessor():
                min_tokens = max(min_tokens, processor.min_length - width)
            case MinNewTokensLengthLogitsProcessor():
                min_tokens = max(min_tokens, processor.prompt_length_to_skip + processor.min_new_tokens - width)
            case TemperatureLogitsWarper():
                temperature = processor.temperature
            case TopKLogitsWarper():
                top_k = processor.top_k
            case TopPLogitsWarper():
                top_p = max(processor.top_p, 1e-9)  # transformers takes 0 for "the most likely token only"
            case MinPLogitsWarper():
                min_p = processor.min_p
        own_filter = getattr(processor, "filter_value", -math.inf) != -math.inf
        if own_filter or getattr(processor, "min_tokens_to_keep", 1) != 1:
            raise NotServed("logits_processor with its own filter_value or min_tokens_to_keep")
        held_back = getattr(processor, "eos_token_id", None)
        if held_back is not None and {token for token in held_back.tolist() if token >= 0} != stop_token_ids:
            raise NotServed("logits_processor with a min_length for other tokens than eos_token_id")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(min_tokens, max_tokens),
        temperature=temperature if do_sample else 0.0,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        stop_token_ids=tuple(sorted(stop_token_ids)),
        ignore_eos=True,
    )
