"""What a replica is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paged_backend.config import EngineConfig
from paged_backend.errors import InvalidArgument
from paged_backend.kv_cache.block_pool import BlockPool
from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.kv_cache.host_tier import HostTier
from paged_backend.plugins.manager import PluginManager
from paged_backend.request import Request
from paged_backend.scheduler.policy import SchedulingPolicy
from paged_backend.scheduler.preemption import PreemptionCosts, PreemptionPolicy
from paged_backend.scheduler.scheduler import Scheduler
from paged_backend.simulate.names import ALLOCATORS, PAGED, RESERVATIONS
from paged_backend.simulate.reservation import Buddy, FirstFit, ReservingScheduler, ReservingTables, reserved_tokens
from paged_backend.simulate.shapes import Device, ModelShape
from paged_backend.simulate.step_time import Roofline, StepTime

_UNUSED = (
    *("dtype", "revision", "trust_remote_code", "attention_backend", "queue_timeout", "timeout", "step_timeout"),
    "isolate_tenants",
)


@dataclass(frozen=True, slots=True)
class Setup:
    """One replica: the engine's configuration, the model and device it stands for, and how it reserves memory."""

    config: EngineConfig
    model: ModelShape
    device: Device
    reserve: str = PAGED
    allocator: str = "buddy"
    """Of the reservations that are not paged."""
    step_time: StepTime | None = None
    """None: the roofline of model and device."""
    fast_forward: bool = True
    """Take decode steps in which nothing else happens all at once. False gives the same times, slowly."""

    def __post_init__(self) -> None:
        for name in _UNUSED:
            value = getattr(self.config, name)
            if value != EngineConfig.model_fields[name].default:
                raise InvalidArgument(name, value, "the simulator does not use it")
        if self.reserve not in RESERVATIONS:
            raise InvalidArgument("reserve", self.reserve, f"must be one of {', '.join(RESERVATIONS)}")
        if self.allocator not in ALLOCATORS:
            raise InvalidArgument("allocator", self.allocator, f"must be one of {', '.join(ALLOCATORS)}")
        if self.num_blocks < self._blocks_for(2):
            raise InvalidArgument(
                "device", self.device.name, f"has no room for K and V beside the weights of {self.model.name}"
            )
        asked = self.config.max_model_len
        if asked is not None and asked > self._longest:
            raise InvalidArgument(
                "max_model_len", asked, f"must be at most {self._longest}, the tokens that fit (reserve={self.reserve})"
            )

    @property
    def num_blocks(self) -> int:
        """Blocks of KV, as the engine would count them but for the room that a step's activations take."""
        config = self.config
        if config.num_blocks is not None:
            return config.num_blocks
        room = self.device.memory_bytes * config.gpu_memory_utilization - self.model.weight_bytes
        return int((config.kv_cache_bytes or max(0, room)) // self.block_bytes)

    @property
    def block_bytes(self) -> int:
        """K and V of one block."""
        return self.config.block_size * self.model.kv_bytes_per_token

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self.config.max_model_len or min(self.model.max_model_len, self._longest)

    @property
    def _longest(self) -> int:
        """Tokens of one request that an empty memory has room for: a buddy allocator's is the largest power of two."""
        buddies = self.reserve != PAGED and self.allocator == "buddy"
        blocks = 1 << (self.num_blocks.bit_length() - 1) if buddies else self.num_blocks
        return blocks * self.config.block_size

    def make_scheduler(self, plugins: PluginManager, longest: int, watch: Watch) -> Scheduler:
        """The real scheduler over the real block accounting; no request will have more tokens than `longest`."""
        config, plug = self.config, plugins.make
        host = None
        if config.swap_space_bytes >= self.block_bytes:
            eviction = plug("paged_eviction_policy", "eviction_policy", config.eviction_policy, config=config)
            host = HostTier(config.swap_space_bytes // self.block_bytes, eviction)
        pool = BlockPool(
            self.num_blocks,
            eviction=plug("paged_eviction_policy", "eviction_policy", config.eviction_policy, config=config),
            on_evict=host.keep_evicted if host else None,
        )
        policy = plug("paged_scheduling_policy", "scheduling_policy", config.scheduling_policy, config=config)
        watch.policy = plug("paged_preemption_policy", "preemption_policy", config.preemption_policy, config=config)
        make = self._paged_scheduler if self.reserve == PAGED else self._reserving_scheduler
        return make(policy, pool, watch, host, longest)

    def _paged_scheduler(
        self, policy: SchedulingPolicy, pool: BlockPool, watch: Watch, host: HostTier | None, longest: int
    ) -> Scheduler:
        config = self.config
        tables = BlockTables(pool, block_size=config.block_size, num_slots=config.max_num_seqs, max_model_len=longest)
        return Scheduler(
            policy,
            tables,
            max_num_batched_tokens=config.step_tokens,
            max_prefill_tokens=config.prefill_tokens,
            preemption=watch,
            host=host,
            costs=PreemptionCosts(
                2 * self.model.body_params / self.device.flops_per_second,
                self.device.host_bytes_per_second if host else 0.0,
                self.model.kv_bytes_per_token,
            ),
        )

    def _reserving_scheduler(
        self, policy: SchedulingPolicy, pool: BlockPool, watch: Watch, host: HostTier | None, longest: int
    ) -> Scheduler:
        config, most = self.config, self.max_model_len
        tables = ReservingTables(
            pool,
            Buddy(self.num_blocks) if self.allocator == "buddy" else FirstFit(self.num_blocks),
            block_size=config.block_size,
            num_slots=config.max_num_seqs,
            max_model_len=most,
        )
        return ReservingScheduler(
            policy,
            tables,
            size=lambda request: reserved_tokens(self.reserve, request, most),
            max_num_batched_tokens=config.step_tokens,
            max_prefill_tokens=config.prefill_tokens,
            preemption=watch,
        )

    def make_step_time(self) -> StepTime:
        """See `step_time`."""
        return self.step_time or Roofline(self.model, self.device)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)


class Watch:
    """A preemption policy that asks another one, and tells whom it chose before anything of him is gone."""

    policy: PreemptionPolicy

    def __init__(self, chosen: Callable[[Request], None]) -> None:
        self._chosen = chosen

    def victim(self, candidates: Sequence[Request]) -> Request:
        """See `PreemptionPolicy.victim`."""
        request = self.policy.victim(candidates)
        self._chosen(request)
        return request

    def swaps(self, num_tokens: int, costs: PreemptionCosts) -> bool:
        """See `PreemptionPolicy.swaps`."""
        return self.policy.swaps(num_tokens, costs)
