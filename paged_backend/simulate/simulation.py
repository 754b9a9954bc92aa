"""Many replicas, one trace: events in order of time."""

from __future__ import annotations

import heapq
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

from paged_backend.errors import InvalidArgument
from paged_backend.plugins.manager import PluginManager
from paged_backend.request import SamplingParams
from paged_backend.simulate.names import PAGED
from paged_backend.simulate.outcomes import Outcomes
from paged_backend.simulate.replica import Replica, SimulatedRequest
from paged_backend.simulate.router import Fleet, Router
from paged_backend.simulate.setup import Setup
from paged_backend.simulate.timeline import Timeline
from paged_backend.simulate.trace import Trace

MAX_REPLICAS = 10_000
_PARAMS = SamplingParams(ignore_eos=True)
_NO_STOPS: frozenset[int] = frozenset()


@dataclass(slots=True)
class Run:
    """What a simulation found."""

    setup: Setup
    outcomes: Outcomes
    timeline: Timeline
    replicas: list[Replica]

    @property
    def end(self) -> float:
        """Seconds at which the last step ended."""
        return max(replica.now for replica in self.replicas)


def simulate(
    trace: Trace,
    setup: Setup,
    num_replicas: int = 1,
    router: str = "round-robin",
    plugins: PluginManager | None = None,
    progress: Callable[[int], None] = lambda ended: None,
) -> Run:
    """Send a trace to equal replicas until every request has ended. Equal arguments give equal results.

    `progress` gets the number of ended requests now and then. Raises `InvalidArgument` for an unknown router or policy
    and for less than one replica.
    """
    if not 1 <= num_replicas <= MAX_REPLICAS:
        raise InvalidArgument("replicas", num_replicas, f"must be 1 to {MAX_REPLICAS}")
    plugins = plugins or PluginManager()
    chosen: Router = plugins.make("paged_router", "router", router, config=setup.config)
    outcomes, fleet, timeline = Outcomes.of(trace, setup.max_model_len), Fleet(num_replicas), Timeline()
    longest = int((trace.prompt + outcomes.output)[~outcomes.refused].max(initial=2))
    replicas = [Replica(index, setup, plugins, outcomes, fleet, timeline, longest) for index in range(num_replicas)]
    events: list[tuple[float, int]] = []
    """(due, replica); an entry is stale when the replica is due at another time."""

    steps = 0

    def run_until(time: float) -> None:
        """All that is due before `time`."""
        nonlocal steps
        while events and events[0][0] < time:
            due, index = events[0]
            replica = replicas[index]
            if replica.due != due:
                heapq.heappop(events)
                continue
            replica.run_due()
            if replica.due == math.inf:
                heapq.heappop(events)
            else:
                heapq.heapreplace(events, (replica.due, index))
            steps += 1
            if not steps & 4095:
                progress(outcomes.num_ended)

    for request in _requests(trace, outcomes, setup):
        time = request.arrival_time
        run_until(time)
        replica = replicas[chosen.choose(request, fleet)]
        before = replica.due
        replica.accept(request, time)
        if replica.due != before:
            heapq.heappush(events, (replica.due, replica.index))
    run_until(math.inf)
    progress(outcomes.num_ended)
    return Run(setup, outcomes, timeline, replicas)


def _requests(trace: Trace, outcomes: Outcomes, setup: Setup) -> Iterator[SimulatedRequest]:
    """The requests that are not refused, made when they arrive: a million of them would not be small."""
    shares = setup.reserve == PAGED and setup.config.enable_prefix_caching
    names: dict[int, list[bytes]] = {}
    """Hashes of the full blocks of each prefix, which all its requests share."""
    columns = (trace.prompt, outcomes.output, trace.tenant, trace.prefix, trace.prefix_tokens, trace.priority)
    lists = (column.tolist() for column in columns)
    rows = zip(trace.arrival.tolist(), outcomes.refused.tolist(), *lists, strict=True)
    for number, (arrival, refused, prompt, output, tenant, prefix, prefix_tokens, priority) in enumerate(rows):
        if refused:
            continue
        hashes: list[bytes] = []
        if shares and prefix >= 0 and prefix_tokens:
            full = prefix_tokens // setup.config.block_size
            known = names.setdefault(prefix, hashes)
            known += [struct.pack("<qq", prefix, index) for index in range(len(known), full)]
            hashes = known if len(known) == full else known[:full]
        yield SimulatedRequest(
            request_id=str(number),
            token_ids=cast("list[int]", range(prompt)),
            num_prompt_tokens=prompt,
            params=_PARAMS,
            max_total_tokens=prompt + output,
            stop_token_ids=_NO_STOPS,
            seed=0,
            priority=priority,
            tenant=trace.tenants[tenant],
            arrival_index=number,
            arrival_time=arrival,
            block_hashes=hashes,
            number=number,
        )
