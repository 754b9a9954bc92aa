"""What arrives, and when: a trace as arrays, and a generator of traces."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from paged_backend.errors import InvalidArgument
from paged_backend.simulate.names import NOISY, SHAREGPT_OUTPUT, SHAREGPT_PROMPT

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival; row i of every array is request i."""

    arrival: Floats
    """Seconds since the first request, or since the start of a generated trace."""
    prompt: Ints
    """Tokens, at least 1."""
    output: Ints
    """Tokens that are generated, at least 1; also the most that the request asks for."""
    tenant: Ints
    """Index into `tenants`."""
    prefix: Ints
    """Prompts with the same number begin alike; -1 begins like no other."""
    prefix_tokens: Ints
    """How many tokens at the beginning are those of the prefix."""
    priority: Ints
    tenants: tuple[str, ...] = ("",)

    @classmethod
    def of(
        cls,
        arrival: npt.ArrayLike,
        prompt: npt.ArrayLike,
        output: npt.ArrayLike,
        *,
        tenant: npt.ArrayLike = 0,
        prefix: npt.ArrayLike = -1,
        prefix_tokens: npt.ArrayLike = 0,
        priority: npt.ArrayLike = 0,
        tenants: tuple[str, ...] = ("",),
    ) -> Trace:
        """Sort by arrival, and repeat scalars for every request."""
        times = np.asarray(arrival, dtype=np.float64)
        order = np.argsort(times, kind="stable")

        def column(values: npt.ArrayLike) -> Ints:
            return np.broadcast_to(np.asarray(values, dtype=np.int64), times.shape)[order]

        return cls(
            times[order],
            column(prompt),
            column(output),
            column(tenant),
            column(prefix),
            column(prefix_tokens),
            column(priority),
            tenants,
        )

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def rate(self) -> float:
        """Requests a second from the first arrival to the last; infinite when all arrive at once."""
        span = float(self.arrival[-1] - self.arrival[0]) if len(self) else 0.0
        return (len(self) - 1) / span if span else math.inf

    def at_rate(self, rate: float) -> Trace:
        """The same requests, with all gaps between arrivals scaled to this mean rate in requests a second."""
        now = self.rate
        if math.isinf(now):
            return self
        return self._with(arrival=(self.arrival - self.arrival[0]) * (now / rate))

    def first(self, count: int) -> Trace:
        """The first `count` requests."""
        rows = {field.name: getattr(self, field.name)[:count] for field in fields(self) if field.name != "tenants"}
        return self._with(**rows)

    def and_also(self, other: Trace) -> Trace:
        """Both, in order of arrival. Tenants of equal name are one; prefixes are those of this trace and others."""
        tenants = tuple(dict.fromkeys(self.tenants + other.tenants))
        places = np.array([tenants.index(name) for name in other.tenants])
        shift = int(self.prefix.max(initial=-1)) + 1
        both = {
            "tenant": np.concatenate([self.tenant, places[other.tenant]]),
            "prefix": np.concatenate([self.prefix, np.where(other.prefix < 0, -1, other.prefix + shift)]),
        }
        for name in ("arrival", "prompt", "output", "prefix_tokens", "priority"):
            both[name] = np.concatenate([getattr(self, name), getattr(other, name)])
        return Trace.of(**both, tenants=tenants)

    def _with(self, **changes: object) -> Trace:
        return Trace(**{field.name: getattr(self, field.name) for field in fields(self)} | changes)


PROMPT_SIGMA, OUTPUT_SIGMA = 1.2, 0.9
"""Spread of the logarithms of ShareGPT lengths. The paper shows only histograms; these are our reading of them."""


def generate(
    num_requests: int,
    rate: float,
    seed: int = 0,
    *,
    burstiness: float = 1.0,
    mean_prompt: float = SHAREGPT_PROMPT,
    mean_output: float = SHAREGPT_OUTPUT,
    max_total: int = 2048,
    tenants: int = 1,
    prefixes: int = 0,
    prefix_tokens: int = 0,
) -> Trace:
    """A ShareGPT-like trace; equal arguments make equal traces.

    Prompt and output lengths are lognormal, clipped to 1 .. `max_total` / 2 tokens, as the paper keeps conversations
    of at most 2048, and scaled so that the clipped lengths have the given means. Gaps between arrivals are gamma
    distributed with shape `burstiness` and mean 1 / `rate` seconds: 1 is a Poisson process, less comes in bursts; an
    infinite rate lets all arrive at once. Each request is of one of `tenants` tenants and, with `prefixes`, begins with
    one of so many shared beginnings of `prefix_tokens` tokens, which come on top of its prompt; the popularity of the
    beginnings falls as 1 / rank.

    Raises `InvalidArgument` for what is out of range.
    """
    _at_least("requests", num_requests, 1)
    _at_least("tenants", tenants, 1)
    _at_least("prefixes", prefixes, 0)
    _at_least("prefix_tokens", prefix_tokens, 1 if prefixes else 0)
    _at_least("max_total", max_total, 4)
    for name, value in (("rate", rate), ("burstiness", burstiness)):
        if not value > 0:
            raise InvalidArgument(name, value, "must be more than 0")
    rng = np.random.default_rng(seed)
    prompt = _lengths(rng, num_requests, "mean_prompt", mean_prompt, PROMPT_SIGMA, max_total // 2)
    output = _lengths(rng, num_requests, "mean_output", mean_output, OUTPUT_SIGMA, max_total // 2)
    arrival = np.cumsum(rng.gamma(burstiness, 1 / (rate * burstiness), num_requests))
    tenant = rng.integers(tenants, size=num_requests)
    prefix: Ints | int = -1
    if prefixes:
        weights = 1 / np.arange(1, prefixes + 1)
        prefix = rng.choice(prefixes, num_requests, p=weights / weights.sum())
        prompt += prefix_tokens
    names = tuple(f"tenant-{index}" for index in range(tenants)) if tenants > 1 else ("",)
    return Trace.of(arrival, prompt, output, tenant=tenant, prefix=prefix, prefix_tokens=prefix_tokens, tenants=names)


def burst(num_requests: int, prompt: int, output: int, at: float) -> Trace:
    """Equal requests of the tenant `NOISY` that arrive all at once, `at` seconds after the start."""
    _at_least("noisy_requests", num_requests, 0)
    _at_least("noisy_prompt", prompt, 1)
    _at_least("noisy_output", output, 1)
    if not (at >= 0 and math.isfinite(at)):
        raise InvalidArgument("noisy_at", at, "must be seconds, 0 or more")
    return Trace.of(np.full(num_requests, at), prompt, output, tenants=(NOISY,))


def _lengths(rng: np.random.Generator, count: int, name: str, mean: float, sigma: float, most: int) -> Ints:
    if not 1 <= mean <= most / 2:
        raise InvalidArgument(name, mean, f"must be 1 to {most / 2:g}, a quarter of the longest request")
    lengths = np.exp(rng.normal(_clipped_mu(mean, sigma, most), sigma, count))
    rounded: Ints = np.clip(np.rint(lengths), 1, most).astype(np.int64)
    return rounded


def _clipped_mu(mean: float, sigma: float, most: float) -> float:
    """The location of a lognormal whose values, where more than `most` counts as `most`, have this mean."""
    normal = NormalDist()
    low, high = math.log(mean) - sigma**2, math.log(most) + 1
    for _ in range(60):
        mu = (low + high) / 2
        at = (math.log(most) - mu) / sigma
        clipped = math.exp(mu + sigma**2 / 2) * normal.cdf(at - sigma) + most * (1 - normal.cdf(at))
        low, high = (mu, high) if clipped < mean else (low, mu)
    return (low + high) / 2


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InvalidArgument(name, value, f"must be at least {least}")
