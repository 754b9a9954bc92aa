"""Grammars that outputs have to match, and where in them the outputs are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from paged_backend.errors import InvalidArgument
from paged_backend.structured_outputs import Kind, StructuredOutputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_COMPILED = 64


class Matcher(Protocol):
    """A grammar, and how far into it an output is."""

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        """Set the bits of the tokens whose text may come next: none of end-of-sequence. See `request.Grammar`.

        Raises ValueError if that cannot be worked out.
        """
        ...

    def accept(self, token: int) -> None:
        """The next token. Raises ValueError if it may not come here."""
        ...

    @property
    def may_end(self) -> bool:
        """Whether the output matches as it is."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether the output matches, and nothing may follow. May be False where only `fill` finds out."""
        ...

    def copy(self) -> Matcher:
        """For another output, which is as far as this one. From any thread, while nobody uses this one."""
        ...


class GrammarCompiler(Protocol):
    """For one model. Used from any thread."""

    def compile(self, kind: Kind, text: str) -> Matcher:
        """Raises ValueError saying what is wrong with the text."""
        ...


GrammarBackend = Callable[["PreTrainedTokenizerBase", int, frozenset[int]], GrammarCompiler]
"""Made by the hook `paged_grammar_backend`. Called with tokenizer, size of the model's vocabulary and end-of-sequence
tokens when the first request has a grammar; raises ValueError if it cannot serve these."""


class Grammars:
    """Compiles what requests ask for, in their callers' threads, and remembers the latest."""

    def __init__(
        self,
        backend: GrammarBackend,
        tokenizer: PreTrainedTokenizerBase | None,
        vocab_size: int,
        eos: frozenset[int],
    ) -> None:
        self._backend, self._tokenizer, self._vocab_size, self._eos = backend, tokenizer, vocab_size, eos
        self._compiler: GrammarCompiler | None = None
        self._compiled: dict[tuple[Kind, str], Matcher] = {}
        """The latest is the last."""
        self._state = threading.Lock()  # guards these two

    def make(self, wanted: StructuredOutputs, ends: frozenset[int]) -> GuidedOutput:
        """For a new output, which one of the tokens `ends` may end. Raises `InvalidArgument`."""
        source = wanted.source
        try:
            return GuidedOutput(self._recall(source) or self._compile(source), ends)
        except ValueError as error:
            raise InvalidArgument("structured_outputs", source[1], str(error)) from None

    def _recall(self, source: tuple[Kind, str]) -> Matcher | None:
        """Copies of a matcher may share what they have worked out, and limits on that, so it may be used up."""
        with self._state:
            known = self._compiled.pop(source, None)
            if known is None:
                return None
            self._compiled[source] = known
            matcher = known.copy()
        try:
            self._try(matcher)
        except ValueError:
            return None
        return matcher

    def _compile(self, source: tuple[Kind, str]) -> Matcher:
        if self._tokenizer is None:
            raise ValueError("structured outputs need a tokenizer, and this engine has none")
        with self._state:
            if self._compiler is None:
                self._compiler = self._backend(self._tokenizer, self._vocab_size, self._eos)
        matcher = self._compiler.compile(*source)
        self._try(matcher)
        with self._state:
            self._compiled[source] = matcher
            if len(self._compiled) > _MOST_COMPILED:
                del self._compiled[next(iter(self._compiled))]
            return matcher.copy()

    def _try(self, matcher: Matcher) -> None:
        """The first mask may take long, and be refused: not on the engine's thread."""
        matcher.fill(np.zeros(-(-self._vocab_size // 32), dtype=np.int32))


class GuidedOutput:
    """A `request.Grammar`: a matcher, and the tokens that end its request."""

    def __init__(self, matcher: Matcher, ends: frozenset[int]) -> None:
        self._matcher, self._ends = matcher, ends
        self.is_over = False
        self.error: Exception | None = None

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        """See `request.Grammar`."""
        try:
            self._matcher.fill(row)
            if not self._matcher.may_end:
                return
        except Exception as error:  # then no token is allowed, which ends this request alone
            self.error = error
            row[:] = 0
            return
        self.is_over = not row.any()
        words = row.view(np.uint32)
        for token in self._ends:
            words[token // 32] |= np.uint32(1 << token % 32)

    def accept(self, token: int) -> None:
        """See `request.Grammar`."""
        if token not in self._ends:
            self._matcher.accept(token)
            self.is_over = self._matcher.is_over

    def copy(self) -> GuidedOutput:
        """See `request.Grammar`."""
        return GuidedOutput(self._matcher.copy(), self._ends)
