"""Every error a caller can see. Bad input is an `InvalidArgument`: it names field, value and allowed range."""

from __future__ import annotations

import difflib
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError


class PagedBackendError(Exception):
    """Base of every error raised on purpose by this package."""


class Excerpt(str):
    """The beginning of a `repr`, and its own one."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class InvalidArgument(PagedBackendError, ValueError):
    """A field has a value outside its allowed range; the message says all three. An `Excerpt` is kept of a long one."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        shown = repr(value)
        if len(shown) > 200 and not isinstance(value, Excerpt):
            value = shown = Excerpt(f"{shown[:200]}... ({len(shown)} characters)")
        super().__init__(f"{field}={shown}: {allowed}")
        self.field, self.value, self.allowed = field, value, allowed

    def __reduce__(self) -> tuple[type[Self], tuple[str, object, str]]:
        return type(self), (self.field, self.value, self.allowed)


class UnsupportedModel(PagedBackendError):
    """The model computes attention in a way the paged cache cannot reproduce."""


class Overloaded(PagedBackendError):
    """The bounded waiting queue is full; try again later."""


class DeadlineExceeded(PagedBackendError):
    """The request waited, or took, longer than its `queue_timeout` or `timeout`."""

    @classmethod
    def of(cls, field: str, limit: float, since: float) -> Self:
        """Of a request whose `field` allows `limit` seconds, and which arrived `since` seconds ago."""
        return cls(f"{field}={limit:g}: the request was ended after {since:.3f} seconds")


class EngineDead(PagedBackendError):
    """The engine met an error it cannot survive, or was closed; it serves no more requests."""


class CheckedModel(BaseModel):
    """Immutable pydantic model whose validation errors are `InvalidArgument`, with a hint for misspelt fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            cause = first.get("ctx", {}).get("error")
            if isinstance(cause, InvalidArgument):  # raised by a validator over several fields
                raise cause from None
            field = ".".join(map(str, first["loc"])) or type(self).__name__
            allowed = first["msg"].removeprefix("Value error, ")
            if first["type"] == "extra_forbidden":
                known = sorted(info.alias or name for name, info in type(self).model_fields.items())
                close = difflib.get_close_matches(field, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(known)}"
                allowed = f"unknown field of {type(self).__name__}; {hint}"
            value = None if first["type"] == "missing" else first["input"]  # which is what it is missing from
            raise InvalidArgument(field, value, allowed) from None
