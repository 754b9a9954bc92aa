"""Every knob of the engine, once."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from paged_backend.errors import CheckedModel, InvalidArgument

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGT", start=1)}


def _parse_bytes(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?)B?\s*", value)
    if not match or match[2] not in _UNITS:
        raise ValueError("must be a number of bytes, or one with a unit: K, M, G, T, KiB, MiB, GiB or TiB")
    return int(float(match[1]) * _UNITS[match[2]])


Bytes = Annotated[int, BeforeValidator(_parse_bytes)]


class EngineConfig(CheckedModel):
    """Configuration of one `Engine`. Immutable; a bad value raises `InvalidArgument` naming the field."""

    model: str | None = None
    """Local directory, hub id, or a name listed by `paged-backend models`. None when a loaded model is passed in."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    trust_remote_code: bool = False
    """Run Python code shipped inside the model folder."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights and KV cache. "auto" is what the checkpoint says."""
    quantization: Literal["int8"] | None = None
    """int8: on a CPU, round the weights of linear layers to int8, with a scale an output. For models that can be fused.
    None computes in `dtype`."""
    device: str = "auto"
    """torch device, such as "cpu" or "cuda:1". "auto" is the first CUDA device, else the CPU."""

    block_size: int = Field(16, ge=1, le=1024)
    """Tokens per KV block. Unless it is set, an attention backend may choose another: triton takes 64."""
    num_blocks: int | None = Field(None, ge=1)
    """KV blocks in the cache. None derives it from `kv_cache_bytes`."""
    kv_cache_bytes: Bytes | None = Field(None, ge=1)
    """Memory for the KV cache; "4GiB" works too. None: on a GPU what `gpu_memory_utilization` leaves after the model
    and the largest step; on a CPU a quarter of the free memory, at most 4 GiB."""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of the GPU's memory this engine may use in all."""

    max_model_len: int | None = Field(None, ge=2)
    """Most tokens of prompt and output together. None: what the model was trained for, capped by the cache."""
    max_num_seqs: int = Field(256, ge=1, le=65536)
    """Most requests running at once."""
    optimize_for: Literal["throughput", "latency", "balanced"] = "balanced"
    """Sets the token budgets below, each of which may still be set: larger steps are more efficient, smaller ones keep
    the time between tokens short while prompts arrive."""
    max_num_batched_tokens: int | None = Field(None, ge=1)
    """Token budget of one step: each decode takes one, prefill chunks share the rest. At least `max_num_seqs`. None:
    16384, 2048 or 1024 (throughput, balanced, latency), or `max_num_seqs` if that is more."""
    max_prefill_tokens: int | None = Field(None, ge=1)
    """Most prompt tokens of a step that also decodes: it bounds the time between tokens of running requests. None:
    16384, 1024 or 256."""
    max_waiting: int = Field(4096, ge=1)
    """Most requests waiting; one more is refused with `Overloaded`."""
    queue_timeout: float | None = Field(None, gt=0)
    """Seconds a request may wait for its first slot, unless it says otherwise. None: for ever."""
    timeout: float | None = Field(None, gt=0)
    """Seconds a request may take in all, unless it says otherwise. None: for ever."""
    step_timeout: float = Field(300, ge=0)
    """Seconds after which a step that has not ended is taken for hung: the engine's process, if it has one of its own,
    is killed, and every request told. The first steps may compile kernels, so be generous. 0: never."""

    stream_interval: int = Field(1, ge=1)
    """Least number of tokens of a request that an engine in a process of its own, such as Triton's, hands out at once,
    after the first, which comes alone. More mean fewer messages, which take time from an engine on the same cores."""
    stream_share: float = Field(0.02, gt=0, le=1)
    """About how much of the time of the cores an engine on a CPU that has a process of its own may lose to responses:
    tokens of a request, after the first, wait for each other to keep to it, up to a second, or 16 steps if these take
    longer. 1: none waits."""

    enable_prefix_caching: bool = True
    """Keep blocks of ended requests and share blocks of running ones where prompts begin alike."""
    isolate_tenants: bool = False
    """Share no prefix between requests of different tenants, whatever `cache_salt` they have."""
    swap_space_bytes: Bytes = Field(0, ge=0)
    """Host memory, pinned on a GPU machine, for blocks of preempted requests and evicted prefixes; "8GiB" works too."""

    scheduling_policy: str = "fcfs"
    """fcfs, priority, shortest-remaining or fair-share; plugins add more (`paged-backend plugins`)."""
    ageing_seconds: float = Field(10.0, gt=0)
    """Under "priority": waiting this long is worth one level of priority."""
    ageing_tokens_per_second: float = Field(100.0, ge=0)
    """Under "shortest-remaining": waiting a second is worth this many tokens less."""
    preemption_policy: str = "auto"
    """How preempted requests and evicted prefixes come back: recompute, swap (through `swap_space_bytes`), or auto,
    the cheaper one as measured."""
    eviction_policy: str = "lru"
    """Which cached block goes first when room is needed."""
    attention_backend: str = "auto"
    """reference (plain PyTorch), cpu (compiled kernels, AVX2 or AVX-512), triton (kernels for CUDA GPUs), or auto: cpu
    on a CPU, triton on a GPU that has the shared memory (A100, H100 and later ones); plugins add more."""
    grammar_backend: str = "auto"
    """What compiles `SamplingParams.structured_outputs`: llguidance, or auto, which is that; plugins add more."""
    fuse: bool = True
    """With the cpu and triton backends, compute models of a known structure with packed weights and fused kernels."""
    one_call: bool = True
    """On a CPU, compute all layers of a step of a fused model in one call of the compiled kernels, where these have its
    linear layers: in bfloat16 on CPUs with AVX-512 BF16, and in int8."""
    cuda_graphs: bool = True
    """Replay steps of fused models as CUDA graphs: decodes, and short chunks of prompts beside them."""
    look_ahead: bool = True
    """Plan and launch each step before the tokens of the one before are known, so that the device never waits."""

    @model_validator(mode="after")
    def _consistent(self) -> EngineConfig:
        if self.max_num_batched_tokens is not None and self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidArgument(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"must be at least max_num_seqs={self.max_num_seqs}, so that every decode fits",
            )
        if self.quantization is not None and not self.fuse:
            raise InvalidArgument("quantization", self.quantization, "needs fuse=True")
        return self

    @property
    def step_tokens(self) -> int:
        """`max_num_batched_tokens`, or what `optimize_for` makes it."""
        default = {"throughput": 16384, "balanced": 2048, "latency": 1024}[self.optimize_for]
        return self.max_num_batched_tokens or max(default, self.max_num_seqs)

    @property
    def prefill_tokens(self) -> int:
        """`max_prefill_tokens`, or what `optimize_for` makes it."""
        return self.max_prefill_tokens or {"throughput": 16384, "balanced": 1024, "latency": 256}[self.optimize_for]

    def require_model(self) -> str:
        """The model to load. Raises `InvalidArgument` if none is named."""
        if not self.model:
            raise InvalidArgument("model", self.model, "a local directory, hub id or known name is required")
        return self.model
