"""Grammars compiled by llguidance, which is not installed unless asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from paged_backend.structured_outputs import Kind
from paged_backend.text.trial import Trial

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerBase

_END = "<|end of grammar|>"


class LLGuidance:
    """The grammar backend "llguidance". Raises ValueError without llguidance, and for a tokenizer it cannot read."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos: frozenset[int]) -> None:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise ValueError(f"needs llguidance: pip install 'paged-backend[guided]' ({error})") from None
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(
                f"needs a tokenizer of the tokenizers library; this model's is a {type(tokenizer).__name__}"
            )
        own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        own.no_padding()
        own.no_truncation()
        own.add_special_tokens([_END])  # the library wants an end-of-sequence token, and there may be none
        known = own.get_vocab_size()
        ends = [token for token in (own.token_to_id(_END), *eos) if token is not None and token < known]
        self._tokenizer = LLTokenizer(own.to_str(), n_vocab=max(known, vocab_size), eos_token=ends)
        text = np.zeros(-(-vocab_size // 32) * 32, dtype=np.bool_)
        text[:vocab_size] = True
        text[[token for token in ends if token < len(text)]] = False
        self._text = np.packbits(text, bitorder="little").view(np.int32)
        """The bits of the tokens that the model has, and that end nothing."""
        self._trial = Trial()

    def compile(self, kind: Kind, text: str) -> GuidanceMatcher:
        """See `GrammarCompiler`."""
        from llguidance import LLMatcher, LLParserLimits

        grammar = self._trial(kind, text)
        limits = LLParserLimits(verbose_errors=False, max_lexer_states=50_000)  # 1 to 2 kB each
        return GuidanceMatcher(LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits), self._text)


class GuidanceMatcher:
    """A `grammar.Matcher`."""

    def __init__(self, matcher: LLMatcher, text: npt.NDArray[np.int32]) -> None:
        self._matcher, self._text = matcher, text
        self._check()

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        """See `Matcher`."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)
        self._check()
        np.bitwise_and(mask[: len(row)], self._text, out=row)

    def accept(self, token: int) -> None:
        """See `Matcher`."""
        self._matcher.consume_token(token)
        self._check()

    @property
    def may_end(self) -> bool:
        """See `Matcher`."""
        return self._matcher.is_accepting()

    @property
    def is_over(self) -> bool:
        """See `Matcher`."""
        return self._matcher.is_stopped()

    def copy(self) -> GuidanceMatcher:
        """See `Matcher`. The copies share the states of their lexer."""
        made = object.__new__(GuidanceMatcher)
        made._matcher, made._text = self._matcher.deep_copy(), self._text
        return made

    def _check(self) -> None:
        """Their methods do not raise."""
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error().removesuffix("<non-verbose/>").strip())
