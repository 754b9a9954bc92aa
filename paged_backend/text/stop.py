"""Stop strings in a stream of text."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the first of several strings in text that arrives in pieces."""

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        """`include`: what is found is part of the output."""
        self._strings, self._include = strings, include
        self._held = ""

    def add(self, text: str, *, last: bool = False, armed: bool = True) -> tuple[str, bool]:
        """The text that may go out, and whether a stop string was met; the output ends before it, or behind it.

        Text that could be the start of a stop string is held back until it is decided, or until `last`. Until
        `armed`, stop strings that are complete are let through.
        """
        if not self._strings:
            return text, False
        text = self._held + text
        # The one that is complete first, so that the pieces the text comes in make no difference.
        found = [(at + len(string), at) for string in self._strings if (at := text.find(string)) >= 0]
        if found and armed:
            self._held = ""
            end, begin = min(found)
            return text[: end if self._include else begin], True
        hold = 0 if last else max((self._overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], False

    @staticmethod
    def _overlap(text: str, string: str) -> int:
        """Length of the longest end of `text` that begins `string`."""
        return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
