"""Traces as CSV: our own, Azure's and BurstGPT's, told apart by their headers."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import numpy as np

from paged_backend.errors import InvalidArgument
from paged_backend.simulate.trace import Trace

_OWN = ("arrival", "prompt", "output", "tenant", "prefix", "prefix_tokens", "priority")
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")
_MOST_TOKENS = 10**7
T = TypeVar("T")


def read_trace(path: Path) -> Trace:
    """Read a trace whose header has the columns of one of three formats; the first request arrives at 0.

    Ours: `arrival` (seconds), `prompt`, `output` (tokens) and, if wanted, `tenant` (a name), `prefix` (a name, or
    empty), `prefix_tokens`, `priority`. Azure LLM inference traces: `TIMESTAMP` (ISO 8601), `ContextTokens`,
    `GeneratedTokens`. BurstGPT: `Timestamp` (seconds), `Request tokens`, `Response tokens`. Other columns of the latter
    two are ignored, and so are their rows without output, which failed.

    Raises `InvalidArgument` that names the column, the row (1 follows the header), the value and what is allowed.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = (row for row in csv.reader(file, strict=True) if row)  # blank lines are none
            header = [name.strip() for name in next(rows, [])]
            if set(_OWN[:3]) <= set(header):
                return _read_own(header, list(rows))
            if set(_AZURE) <= set(header):
                return _read_foreign(header, list(rows), _AZURE, _iso_seconds)
            if set(_BURSTGPT) <= set(header):
                return _read_foreign(header, list(rows), _BURSTGPT, _seconds)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidArgument("trace", str(path), f"cannot be read as CSV: {error}") from None
    formats = "; ".join(",".join(columns) for columns in (_OWN[:3], _AZURE, _BURSTGPT))
    raise InvalidArgument("trace", ",".join(header), f"the header must have the columns of one of: {formats}")


def write_trace(trace: Trace, path: Path) -> None:
    """Write our own format, which `read_trace` reads back to the microsecond."""
    columns = (trace.prompt, trace.output, trace.tenant, trace.prefix, trace.prefix_tokens, trace.priority)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_OWN)
        lists = (column.tolist() for column in columns)
        for arrival, prompt, output, tenant, prefix, *rest in zip(trace.arrival.tolist(), *lists, strict=True):
            name = trace.tenants[tenant]
            writer.writerow([f"{arrival:.6f}", prompt, output, name, prefix if prefix >= 0 else "", *rest])


def _read_own(header: list[str], rows: list[list[str]]) -> Trace:
    for name in header:
        if name not in _OWN:
            raise InvalidArgument("trace", name, f"unknown column; there are {', '.join(_OWN)}")
    arrival = _column(rows, header, "arrival", _seconds)
    prompt = _column(rows, header, "prompt", _tokens)
    output = _column(rows, header, "output", _tokens)
    tenants, tenant = _names(rows, header, "tenant")
    prefixes, prefix = _names(rows, header, "prefix")
    prefix_tokens = np.zeros(len(rows), dtype=np.int64)
    if "prefix_tokens" in header:
        prefix_tokens = np.array(_column(rows, header, "prefix_tokens", _whole(0, _MOST_TOKENS, empty=0)))
    priority = [0] * len(rows)
    if "priority" in header:
        priority = _column(rows, header, "priority", _whole(-1000, 1000, empty=0))
    for at in np.flatnonzero(prefix_tokens > prompt)[:1].tolist():
        raise _bad("prefix_tokens", at, int(prefix_tokens[at]), f"must be at most prompt={prompt[at]}")
    return _checked(
        Trace.of(
            np.array(arrival) - min(arrival, default=0),
            prompt,
            output,
            tenant=tenant,
            prefix=np.array([-1 if prefixes[index] == "" else index for index in prefix], dtype=np.int64),
            prefix_tokens=prefix_tokens,
            priority=priority,
            tenants=tenants,
        )
    )


def _read_foreign(
    header: list[str], rows: list[list[str]], columns: Sequence[str], time: Callable[[str], float]
) -> Trace:
    count = _whole(0, _MOST_TOKENS)
    arrival = np.array(_column(rows, header, columns[0], time))
    prompt = np.array(_column(rows, header, columns[1], count))
    output = np.array(_column(rows, header, columns[2], count))
    kept = (prompt > 0) & (output > 0)
    arrival = arrival[kept]
    return _checked(Trace.of(arrival - arrival.min(initial=np.inf), prompt[kept], output[kept]))


def _checked(trace: Trace) -> Trace:
    if not len(trace):
        raise InvalidArgument("trace", 0, "must have at least 1 request")
    return trace


def _column(rows: list[list[str]], header: list[str], name: str, parse: Callable[[str], T]) -> list[T]:
    at = header.index(name)
    values: list[T] = []
    try:
        for row in rows:
            values.append(parse(row[at]))
    except IndexError:
        bad = rows[len(values)]
        raise _bad(name, len(values), ",".join(bad), f"must have {len(header)} columns") from None
    except ValueError as error:
        raise _bad(name, len(values), rows[len(values)][at], str(error)) from None
    return values


def _names(rows: list[list[str]], header: list[str], name: str) -> tuple[tuple[str, ...], list[int]]:
    """The different values of a column, and which of them each row has; one empty one without the column."""
    if name not in header:
        return ("",), [0] * len(rows)
    places: dict[str, int] = {}
    indices = _column(rows, header, name, lambda value: places.setdefault(value, len(places)))
    return tuple(places) or ("",), indices


def _bad(name: str, row: int, value: object, allowed: str) -> InvalidArgument:
    return InvalidArgument(name, value, f"row {row + 1} of the trace: {allowed}")


def _seconds(text: str) -> float:
    allowed = "must be a number of seconds"
    try:
        value = float(text)
    except ValueError:
        raise ValueError(allowed) from None
    if not math.isfinite(value):
        raise ValueError(allowed)
    return value


def _iso_seconds(text: str) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ValueError("must be a time as 2023-11-16 18:17:03.979960") from None


def _whole(least: int, most: int, empty: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if text == "" and empty is not None:
            return empty
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise ValueError(f"must be a whole number, {least} to {most}")
        return value

    return parse


_tokens = _whole(1, _MOST_TOKENS)
