"""Fixed workloads of token ids, the same for every engine that is compared."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

from paged_backend.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that are all submitted at once, decoded past end-of-sequence."""

    name: str
    requests: list[tuple[list[int], int]]
    """Prompt token ids and output length."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0

    @property
    def prompt_tokens(self) -> int:
        """Of all requests."""
        return sum(len(prompt) for prompt, _ in self.requests)

    @property
    def output_tokens(self) -> int:
        """Requested by all requests."""
        return sum(length for _, length in self.requests)

    @property
    def counts_prompts(self) -> bool:
        """Whether the rate is of prompt tokens: prefill is the work when each request asks for one token."""
        return all(length == 1 for _, length in self.requests)

    @property
    def unit(self) -> str:
        """Of tokens per second."""
        return "prompt tok/s" if self.counts_prompts else "output tok/s"

    @property
    def counted_tokens(self) -> int:
        """Numerator of tokens per second."""
        return self.prompt_tokens if self.counts_prompts else self.output_tokens


def _ids(r: random.Random, n: int) -> list[int]:
    return [r.randint(100, 30000) for _ in range(n)]


# The order of the draws is part of the workloads: figures are compared across engines and machines.
def _gpu_set() -> dict[str, list[tuple[list[int], int]]]:
    r = random.Random(0)
    made = {"offline256": [(_ids(r, r.randint(100, 1024)), r.randint(100, 1024)) for _ in range(256)]}
    made["bs1"] = [(_ids(r, 128), 256)]
    made["bs32"] = [(_ids(r, 512), 128) for _ in range(32)]
    prefix = _ids(r, 2048)
    made["shared64"] = [(prefix + _ids(r, 64), 128) for _ in range(64)]
    made["long8"] = [(_ids(r, 16000), 256) for _ in range(8)]
    made["prefill32"] = [(_ids(r, 2048), 1) for _ in range(32)]
    return made


def _cpu_set() -> dict[str, list[tuple[list[int], int]]]:
    r = random.Random(0)
    made = {"batch32": [(_ids(r, r.randint(32, 256)), r.randint(32, 128)) for _ in range(32)]}
    made["cpu1"] = [(_ids(r, 64), 64)]
    prefix = _ids(r, 512)
    made["shared16"] = [(prefix + _ids(r, 32), 32) for _ in range(16)]
    return made


_SETS = {
    "offline256": _gpu_set,
    "bs1": _gpu_set,
    "bs32": _gpu_set,
    "shared64": _gpu_set,
    "long8": _gpu_set,
    "prefill32": _gpu_set,
    "batch32": _cpu_set,
    "cpu1": _cpu_set,
    "shared16": _cpu_set,
}
NAMES = tuple(_SETS)
CPU_SET = tuple(name for name in NAMES if _SETS[name] is _cpu_set)


@functools.cache
def workload(name: str) -> Workload:
    """The workload called `name`. Raises `InvalidArgument` for a name not in `NAMES`."""
    if name not in _SETS:
        raise InvalidArgument("workload", name, f"must be one of {', '.join(NAMES)}")
    return Workload(name, _SETS[name]()[name])
