"""Host time of planning a step, by the number of running requests. No model, no device."""

from __future__ import annotations

import gc
import random
import time
from dataclasses import dataclass

import numpy as np

from paged_backend.kv_cache.block_pool import BlockPool
from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.kv_cache.hashing import root
from paged_backend.request import Request, SamplingParams
from paged_backend.scheduler.plan import StepPlan
from paged_backend.scheduler.policy import SchedulingPolicy
from paged_backend.scheduler.scheduler import Scheduler

_LONGEST = 2048
_BLOCK_SIZE = 16


@dataclass(slots=True)
class PlanningCost:
    """Of steps in which every request decodes one token, and one in sixteen begins a block."""

    running: int
    steps: int
    plan_median_us: float
    plan_p99_us: float
    plan_mean_us: float
    commit_median_us: float
    """To append the sampled tokens to the requests and end the step."""


def measure(running: int, steps: int) -> PlanningCost:
    """Plan and commit `steps` decode steps of `running` requests, prefix caching on."""
    rng = random.Random(0)
    tables = BlockTables(
        BlockPool(running * _LONGEST // _BLOCK_SIZE),
        block_size=_BLOCK_SIZE,
        num_slots=running,
        max_model_len=_LONGEST,
    )
    scheduler = Scheduler(SchedulingPolicy(), tables, max_num_batched_tokens=running * 512)
    params = SamplingParams()
    for index in range(running):
        prompt = [rng.randrange(30_000) for _ in range(rng.randint(64, 512))]
        request = Request(
            request_id=str(index),
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            params=params,
            max_total_tokens=_LONGEST,
            stop_token_ids=frozenset(),
            seed=0,
            arrival_index=index,
            hash_root=root(""),
        )
        scheduler.add(request)

    def commit(plan: StepPlan) -> None:
        for request in plan.sampling:
            request.token_ids.append(7)
        scheduler.end_step()

    commit(scheduler.schedule())
    planned, committed = [], []
    gc.collect()
    for _ in range(steps):
        began = time.perf_counter()
        plan = scheduler.schedule()
        between = time.perf_counter()
        commit(plan)
        planned.append(between - began)
        committed.append(time.perf_counter() - between)
        assert len(plan.slots) == running
    median, p99 = np.percentile(planned, [50, 99]) * 1e6
    return PlanningCost(
        running, steps, float(median), float(p99), float(np.mean(planned) * 1e6), float(np.median(committed) * 1e6)
    )
