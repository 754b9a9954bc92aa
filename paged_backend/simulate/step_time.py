"""How long a step takes: by roofline from the shapes of a model and a device, or as measured."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import Field

from paged_backend.errors import CheckedModel, InvalidArgument
from paged_backend.simulate.shapes import Device, ModelShape


class StepTime(Protocol):
    """Seconds of a step, which grow by the same amount with each of several decode steps in a row."""

    def line(self, prefill: int, decodes: int, samples: int, kv_tokens: int, pairs: int) -> tuple[float, float]:
        """Seconds of a step, and how many more each identical step of decodes after it takes.

        The step runs over `prefill` prompt tokens and one token each of `decodes` rows, computes the logits of
        `samples` rows and reads the K and V of `kv_tokens` tokens; the prompt tokens attend to `pairs` in all.
        """
        ...


def total(line: tuple[float, float], steps: int) -> float:
    """Seconds of so many steps in a row."""
    return steps * line[0] + line[1] * (steps * (steps - 1) / 2)


def steps_within(line: tuple[float, float], seconds: float) -> int:
    """The fewest steps in a row, at least 1, that take so many seconds."""
    first, growth = line
    if growth > 0:
        half = first - growth / 2
        steps = math.ceil((math.sqrt(half * half + 2 * growth * seconds) - half) / growth)
    else:
        steps = math.ceil(seconds / first)
    steps = max(1, steps)
    # The root is rounded, and a step too many or too few would be seen.
    while total(line, steps) < seconds:
        steps += 1
    while steps > 1 and total(line, steps - 1) >= seconds:
        steps -= 1
    return steps


class Roofline:
    """max(weights / bandwidth, flops / flop rate) + K and V / bandwidth + overhead."""

    def __init__(self, model: ModelShape, device: Device) -> None:
        self._overhead = device.overhead_seconds
        self._weights = (model.body_params + model.head_params) * model.dtype_bytes / device.bytes_per_second
        self._token = 2 * model.body_params / device.flops_per_second
        self._sample = 2 * model.head_params / device.flops_per_second
        self._pair = 4 * model.layers * model.heads * model.head_dim / device.flops_per_second
        self._kv_token = model.kv_bytes_per_token / device.bytes_per_second

    def line(self, prefill: int, decodes: int, samples: int, kv_tokens: int, pairs: int) -> tuple[float, float]:
        """See `StepTime.line`."""
        flops = (prefill + decodes) * self._token + samples * self._sample + pairs * self._pair
        seconds = max(self._weights, flops) + kv_tokens * self._kv_token + self._overhead
        return seconds, decodes * self._kv_token


class MeasuredSteps(CheckedModel):
    """seconds = a + b * prefill tokens + c * decode rows + d * tokens whose K and V are read."""

    a: float = Field(gt=0)
    b: float = Field(ge=0)
    c: float = Field(ge=0)
    d: float = Field(ge=0)

    def line(self, prefill: int, decodes: int, samples: int, kv_tokens: int, pairs: int) -> tuple[float, float]:
        """See `StepTime.line`."""
        return self.a + self.b * prefill + self.c * decodes + self.d * kv_tokens, self.d * decodes


_COLUMNS = ("prefill_tokens", "decode_rows", "kv_tokens", "seconds")


def fit(path: Path) -> MeasuredSteps:
    """Least-squares coefficients, none negative, of the measured steps in a CSV file.

    Its columns are `prefill_tokens`, `decode_rows`, `kv_tokens` and `seconds`; others are ignored. Raises
    `InvalidArgument` for a file without them, or with fewer than 4 steps.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise InvalidArgument("step_time", str(path), f"has no column {missing[0]}")
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidArgument("step_time", str(path), f"cannot be read as CSV: {error}") from None
    values = np.zeros((len(rows), 4))
    for index, row in enumerate(rows):
        for column, name in enumerate(_COLUMNS):
            try:
                values[index, column] = float(row[name])
            except (TypeError, ValueError):
                values[index, column] = math.nan
            if not 0 <= values[index, column] < math.inf:
                raise InvalidArgument(name, row[name], f"row {index + 1} of {path}: must be a number, 0 or more")
    if len(rows) < 4:
        raise InvalidArgument("step_time", len(rows), "must have at least 4 measured steps")
    matrix = np.column_stack([np.ones(len(rows)), values[:, :3]])
    used = np.ones(4, dtype=bool)
    found = np.zeros(4)
    while used.any():
        found[:] = 0
        found[used] = np.linalg.lstsq(matrix[:, used], values[:, 3], rcond=None)[0]
        if (found >= 0).all():
            break
        used &= found > 0
    return MeasuredSteps(a=max(float(found[0]), 1e-9), b=found[1], c=found[2], d=found[3])
