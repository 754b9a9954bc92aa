"""What a noisy tenant costs a quiet one on the real engine: time to first token with and without it."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import numpy as np

from paged_backend.config import EngineConfig
from paged_backend.engine import Engine
from paged_backend.request import RequestOptions, SamplingParams


@dataclass(frozen=True, slots=True)
class Load:
    """Prompts of random token ids. The quiet tenant's requests come at intervals, the noisy one's all at the start."""

    quiet_requests: int = 50
    quiet_prompt: int = 512
    quiet_output: int = 8
    quiet_interval: float = 3.0
    """Seconds."""
    noisy_requests: int = 1000
    noisy_prompt: int = 1024
    noisy_output: int = 64


@dataclass(slots=True)
class Waits:
    """Seconds from the quiet tenant's arrivals to its first tokens."""

    policy: str
    noisy_requests: int
    p50: float
    p99: float
    computed_tokens: int
    """Of both tenants, meanwhile."""
    preemptions: int
    seconds: float


def measure(config: EngineConfig, load: Load) -> Waits:
    """One run on an engine of its own; what the noisy tenant still wants in the end is dropped."""
    rng = random.Random(0)

    def add(tenant: str, prompt: int, output: int) -> str:
        token_ids = [rng.randint(100, 30_000) for _ in range(prompt)]
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        return engine.add_request(token_ids, params, RequestOptions(tenant=tenant))

    engine = Engine(config)
    try:
        add("warm-up", load.quiet_prompt, 2)
        while engine.has_work:
            engine.step()
        before = engine.stats()
        for _ in range(load.noisy_requests):
            add("noisy", load.noisy_prompt, load.noisy_output)
        began = time.monotonic()
        due: dict[str, float] = {}
        waits: dict[str, float] = {}
        while len(waits) < load.quiet_requests:
            arrives = began + len(due) * load.quiet_interval
            if len(due) < load.quiet_requests and arrives <= time.monotonic():
                # While a step ran, perhaps: it has waited since it was due.
                due[add("quiet", load.quiet_prompt, load.quiet_output)] = arrives
            elif engine.has_work:
                for output in engine.step():
                    if output.request_id in due and output.first_token_time is not None:
                        waits.setdefault(output.request_id, output.first_token_time - due[output.request_id])
            else:
                time.sleep(max(0.0, arrives - time.monotonic()))
        after = engine.stats()
    finally:
        engine.close()
    p50, p99 = np.percentile(list(waits.values()), [50, 99])
    return Waits(
        config.scheduling_policy,
        load.noisy_requests,
        float(p50),
        float(p99),
        after.computed_tokens - before.computed_tokens,
        after.preemptions - before.preemptions,
        time.monotonic() - began,
    )
