"""From what a caller sends to a checked `Request`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import operator
import secrets
import struct
import time
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from paged_backend.config import EngineConfig
from paged_backend.errors import DeadlineExceeded, InvalidArgument
from paged_backend.kv_cache import hashing
from paged_backend.plugins.manager import PluginManager
from paged_backend.request import Request, RequestOptions, SamplingParams
from paged_backend.text.chat import Chat, chat_text
from paged_backend.text.grammar import GrammarBackend, Grammars

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[int] | Chat
Spread = SamplingParams | Sequence[SamplingParams] | None

_GOLDEN = 0x9E3779B97F4A7C15
_MOST_CANDIDATES = 1024  # of each beam; a search compares those of all its beams in every step


class Intake:
    """Tokenises and validates. Holds nothing of any request, so it may be used from any thread."""

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        plugins: PluginManager,
        grammar_backend: GrammarBackend,
        *,
        vocab_size: int,
        eos: frozenset[int],
        max_model_len: int,
    ) -> None:
        self._config, self.tokenizer, self._plugins = config, tokenizer, plugins
        self._vocab_size, self.eos, self._max_model_len = vocab_size, eos, max_model_len
        self._grammars = Grammars(grammar_backend, tokenizer, vocab_size, eos)
        self._names = itertools.count()
        longest = 0 if tokenizer is None else max(map(len, tokenizer.get_vocab()))
        self._longest_text = max_model_len * longest
        """Characters. Only a tokenizer that drops some could make fewer than `max_model_len` tokens of more."""

    def make(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        request_id: str | None = None,
        arrival_time: float | None = None,
    ) -> Request:
        """The request; nothing is accepted yet. `arrival_time` None is now.

        Raises `InvalidArgument`, and `DeadlineExceeded` if its time is over already.
        """
        now = time.monotonic()
        arrived = now if arrival_time is None else arrival_time
        params, options = params or SamplingParams(), options or RequestOptions()
        for field, value, kind in (("params", params, SamplingParams), ("options", options, RequestOptions)):
            if not isinstance(value, kind):
                raise InvalidArgument(field, value, f"must be a {kind.__name__}")
        limits = {
            "queue_timeout": options.queue_timeout or self._config.queue_timeout or math.inf,
            "timeout": options.timeout or self._config.timeout or math.inf,
        }
        for name, limit in limits.items():
            if now - arrived >= limit:
                raise DeadlineExceeded.of(name, limit, now - arrived)
        token_ids = self._tokenise(prompt, cut=params.truncate_prompt_tokens is not None)
        if params.truncate_prompt_tokens is not None:
            most = params.truncate_prompt_tokens
            token_ids = token_ids[-(self._max_model_len - 1 if most == -1 else most) :]
        packed = self._packed(token_ids)
        room = self._max_model_len - len(token_ids)
        if room < 1:
            raise InvalidArgument(
                "prompt", prompt, f"has {len(token_ids)} tokens; at most {self._max_model_len - 1} are allowed"
            )
        if params.stop and self.tokenizer is None:
            raise InvalidArgument("stop", params.stop, "stop strings need a tokenizer, and this engine has none")
        for field in ("n", "beam_width"):
            if getattr(params, field) > self._config.max_num_seqs:
                raise InvalidArgument(
                    field, getattr(params, field), f"at most max_num_seqs={self._config.max_num_seqs}"
                )
        for field, token_ids_ in (
            ("logit_bias", params.logit_bias),
            ("allowed_token_ids", params.allowed_token_ids or ()),
        ):
            for token in token_ids_:
                if token >= self._vocab_size:
                    raise InvalidArgument(field, token, f"must be a token id in 0..{self._vocab_size - 1}")
        stops = set(params.stop_token_ids) if params.ignore_eos else self.eos.union(params.stop_token_ids)
        if params.beam_width > 1 and params.beam_width * (1 + len(stops)) > _MOST_CANDIDATES:
            raise InvalidArgument(
                "stop_token_ids",
                f"{len(stops)} tokens",
                f"at most {_MOST_CANDIDATES // params.beam_width - 1} with beam_width={params.beam_width}, "
                "end-of-sequence included",
            )
        ends = frozenset(token for token in stops if 0 <= token < self._vocab_size)  # others never come
        wanted = params.structured_outputs
        salt = options.cache_salt
        if params.prompt_logprobs is not None:
            salt = secrets.token_hex(16)  # what is found in the cache has no logits
        if salt is None:
            salt = "" if self._config.enable_prefix_caching else secrets.token_hex(16)
        if self._config.isolate_tenants:
            salt = repr((options.tenant, salt))  # no other pair has this one's
        request = Request(
            request_id=request_id or f"request-{next(self._names)}",
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            params=params,
            max_total_tokens=len(token_ids) + min(params.max_tokens, room),
            stop_token_ids=ends,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            priority=options.priority,
            tenant=options.tenant,
            hash_root=hashing.root(salt),
            steered=params.beam_width > 1,
            bad_words=self._bad_words(params.bad_words),
            grammar=None if wanted is None else self._grammars.make(wanted, ends),
            prompt_logprobs=None if params.prompt_logprobs is None else [[] for _ in token_ids],
            queue_deadline=arrived + limits["queue_timeout"],
            deadline=arrived + limits["timeout"],
            arrival_time=arrived,
        )
        hashing.extend(request.block_hashes, request.hash_root, packed, self._config.block_size)
        self._plugins.hook.paged_request_filter(request=request)
        return request

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Their tokens, inside a word and at the start of one."""
        if not words:
            return ()
        if self.tokenizer is None:
            raise InvalidArgument("bad_words", words, "words need a tokenizer, and this engine has none")
        texts = [text for word in words for text in (word.lstrip(), f" {word.lstrip()}")]
        ids = self.tokenizer(texts, add_special_tokens=False).input_ids
        return tuple({tuple(tokens) for tokens in ids if tokens})

    def _tokenise(self, prompt: Prompt, *, cut: bool) -> list[int]:
        """All tokens, or if `cut`, at least the last `max_model_len`."""
        if isinstance(prompt, str | Chat):
            if self.tokenizer is None:
                raise InvalidArgument("prompt", prompt, "this engine has no tokenizer; send token ids")
            text = prompt if isinstance(prompt, str) else chat_text(self.tokenizer, prompt)
            if cut:
                text = text[-self._longest_text :]
            if len(text) > self._longest_text:  # which would take long to tokenise
                most = self._max_model_len - 1
                raise InvalidArgument(
                    "prompt", text, f"has {len(text)} characters, more than {most} tokens; at most {most} are allowed"
                )
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidArgument(
                    "prompt", prompt, f"must be valid Unicode: {error.reason} at {error.start}"
                ) from None
            # A chat template writes the special tokens itself.
            token_ids: list[int] = self.tokenizer(text, add_special_tokens=isinstance(prompt, str)).input_ids
        else:
            try:
                token_ids = list(map(operator.index, prompt))
            except TypeError as error:
                raise InvalidArgument("prompt", prompt, f"must be text or a sequence of token ids: {error}") from None
        if not token_ids:
            raise InvalidArgument("prompt", prompt, "must have at least one token")
        return token_ids

    def _packed(self, token_ids: list[int]) -> array[int]:
        """The checked token ids as 32-bit integers, which are fast to hash."""
        # Of text too: tokenizers may have added tokens that the model has no embedding for.
        with contextlib.suppress(struct.error):  # one that takes more bits
            packed = array("i", struct.pack(f"{len(token_ids)}i", *token_ids))  # half the time of array("i", token_ids)
            if np.frombuffer(packed, dtype=np.uint32).max() < self._vocab_size:  # a negative one looks large
                return packed
        at = next(at for at, token in enumerate(token_ids) if not 0 <= token < self._vocab_size)
        raise InvalidArgument(f"prompt[{at}]", token_ids[at], f"must be a token id in 0..{self._vocab_size - 1}")


def sibling(request: Request, index: int) -> Request:
    """Another output of the same prompt, with a seed of its own; it shares the prompt's blocks."""
    return dataclasses.replace(
        request,
        index=index,
        prompt_logprobs=None,  # the first one has them
        token_ids=list(request.token_ids),
        grammar=None if request.grammar is None else request.grammar.copy(),
        block_hashes=list(request.block_hashes),
        seed=(request.seed + index * _GOLDEN) % 2**63,
    )


def spread(params: Spread, prompts: Sequence[Prompt]) -> Sequence[SamplingParams]:
    """Parameters for each prompt. Raises `InvalidArgument` for a list of another length, and for a bare string."""
    if isinstance(prompts, str):
        raise InvalidArgument("prompts", prompts, "must be a list of prompts")
    count = len(prompts)
    if params is None or isinstance(params, SamplingParams | dict):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidArgument("params", f"{len(params)} SamplingParams", f"one, or as many as the {count} prompts")
    return params
