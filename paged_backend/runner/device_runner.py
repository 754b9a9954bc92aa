"""Runs steps whose tokens never leave the device on the way to the next: fused model, sampling and state in one.

The host only sends what it alone knows: which slots a step runs, at which positions, new blocks, prompt tokens. A step
of decodes, with or without short chunks of prompts, is a CUDA graph, one for each size of batch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from paged_kernels.gpu import logits as logits_kernels
from paged_kernels.gpu.compilation import compile_ahead
from paged_kernels.gpu.decode_attention import DecodeRows
from paged_kernels.gpu.prefill_attention import ROWS, PrefillRows, plan_tiles
from paged_kernels.gpu.sampling import sample
from paged_kernels.gpu.shared_prefix import SharedPrefixes, find_prefixes, num_shared_items, plan_prefixes
from paged_kernels.gpu.step import apply_changes, locate, locate_tokens
from paged_kernels.gpu.whole_prompt_attention import is_worth_it, supports_whole_prompts
from paged_kernels.sampling import sample as sample_on_host
from torch import Tensor

from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.kv_cache.swap import SwapSpace
from paged_backend.request import Request
from paged_backend.runner.device_state import DeviceState
from paged_backend.runner.logprobs import Logprobs, asked
from paged_backend.runner.model import PagedModel
from paged_backend.runner.runner import Got, Launched, ModelRunner, Score
from paged_backend.runner.scored_prompts import ScoredPrompts
from paged_backend.runner.step import StepInputs
from paged_backend.scheduler.plan import StepPlan

logger = logging.getLogger(__name__)

_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
_SINGLES, _CHUNKS = (0, 64, 128, 256, 512), (128, 256, 512, 1024)
"""Rows of one token, and tokens of chunks of prompts beside them: each pair has a graph, too."""
_TOKENS_A_CHUNK = 16
"""In the mean, at least: a graph has room for so many chunks."""
_MOST_WORK = 2**41
"""Parameters times tokens, at most, of such a graph. With more the device is busy for as long as the host takes to
launch a step kernel by kernel, 5 to 20 ms, and computing what fills a batch up costs more than a graph saves."""
_RING = 4  # steps whose host buffers are kept apart; two are in flight at most
_Array = npt.NDArray[np.integer[Any]]


@dataclass(slots=True)
class _Enqueued:
    """A step on the device."""

    tokens: Tensor
    """`[rows]` int32 on the host, written when `done`."""
    done: torch.cuda.Event | None
    logprobs: Logprobs | None = None
    prompts: ScoredPrompts | None = None

    def wait(self) -> list[Got]:
        """See `Launched`."""
        if self.done is not None:
            self.done.synchronize()
        tokens: list[Got] = self.tokens.tolist()
        if self.logprobs is not None:
            for row, sampled in self.logprobs.of(self.tokens.tolist()).items():
                tokens[row] = sampled
        return tokens

    def scores(self) -> list[Score]:
        """See `Launched`."""
        return [] if self.prompts is None else self.prompts.scores()


@dataclass(frozen=True, slots=True)
class _Variant:
    """Steps that one graph can run."""

    rows: int
    """Of one token."""
    tokens: int = 0
    """Of chunks of prompts; 0: all rows are decodes."""
    shared: bool = False
    """Whether rows share prefixes."""
    samples: bool = True
    """Whether it also samples: it does unless the logits are to be changed or looked at first."""


class _Sizes(NamedTuple):
    """Of what is sent for a step with chunks."""

    singles: int
    tokens: int
    """Those of the chunks included."""
    sampled: int
    chunks: int
    tiles: int


class DeviceRunner(ModelRunner):
    """A `ModelRunner` for a model that could be fused.

    Steps with beams need the logits on the host, and run as the base class runs them.
    """

    logits_kernels = logits_kernels
    asynchronous = True

    def __init__(
        self,
        paged_model: PagedModel,
        tables: BlockTables,
        *,
        max_model_len: int,
        max_num_tokens: int,
        swap: SwapSpace | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        """`max_num_tokens`: of one step."""
        super().__init__(
            paged_model,
            tables,
            max_model_len=max_model_len,
            sampler=sample_on_host,
            logits_processors=(),
            swap=swap,
        )
        self.device, self.device_state = paged_model.device, DeviceState(tables, paged_model.device)
        num_slots = tables.array.shape[1]
        assert paged_model.fused is not None
        spec = paged_model.layers[0].spec
        self._group = spec.group
        self._num_shared_items = 0
        if len(tables.groups) == 1 and tables.groups[0].keeps_all:
            self._num_shared_items = num_shared_items(spec.num_kv_heads, self.device)
        self._has_whole_prompts = all(
            supports_whole_prompts(layer.spec, paged_model.dtype, self.device) for layer in paged_model.layers
        ) and not any(layer.sinks is not None for layer in paged_model.fused.layers)
        self._on_cuda = self.device.type == "cuda"
        self._pads = cuda_graphs and paged_model.fused.has_static_shapes
        """Whether batches of decodes are padded to few sizes, each of which has a graph on CUDA."""
        self._cuda_graphs = self._pads and self._on_cuda
        self._mixed_sizes: list[tuple[int, int]] = []
        """Single rows, and tokens of chunks beside them, to which a batch of both may be padded."""
        if self._cuda_graphs:
            size = sum(parameter.numel() for parameter in paged_model.model.parameters())
            most = min(max_num_tokens, _MOST_WORK // size)
            sizes = {(min(rows, num_slots), tokens) for rows in _SINGLES for tokens in _CHUNKS}
            self._mixed_sizes = sorted(pair for pair in sizes if sum(pair) <= most)
        self._requests: list[Request | None] = [None] * num_slots
        self._behind = np.zeros(num_slots, dtype=np.bool_)
        """Slots whose last tokens the batch state on the host lacks."""
        self._prefixes_of: bytes | None = None
        self._prefixes: list[tuple[npt.NDArray[np.int64], int]] = []
        """What `find_prefixes` found in the slots `_prefixes_of`."""
        # Three numbers a token, and for scored ones three more, two a tile of queries, some for each row, and changes.
        room = 6 * max_num_tokens + 2 * (max_num_tokens * spec.group // ROWS) + 16 * num_slots + 8192
        self._inbox = torch.zeros(room, dtype=torch.int32, device=self.device)
        self._sent = [torch.zeros(room, dtype=torch.int32, pin_memory=self._on_cuda) for _ in range(_RING)]
        self._tokens = torch.zeros(num_slots, dtype=torch.int32, device=self.device)
        self._logprobs = torch.zeros(num_slots, dtype=torch.float32, device=self.device)
        self._received = [torch.zeros_like(self._tokens, device="cpu", pin_memory=self._on_cuda) for _ in range(_RING)]
        self._counters = paged_model.make_counters(num_slots)
        self._turn = 0
        self._graphs: dict[_Variant, tuple[torch.cuda.CUDAGraph, Tensor | None]] = {}
        """With the logits that each leaves, if it does not sample."""
        if self._on_cuda:
            with torch.inference_mode():
                self._prepare(num_slots)

    # ---- steps

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """See `ModelRunner.launch`."""
        self._move(plan.moves)
        for request in plan.loads:
            self._load(request)
        if not len(plan.slots):
            return _Enqueued(self._received[0][:0], None)
        if any(request.steered for request in plan.sampling):
            return self._launch_on_host(plan)
        self._behind[plan.slots[plan.samples]] = True
        self._turn = (self._turn + 1) % _RING
        is_decode = plan.samples.all() and plan.counts[-1] == 1
        prompts = ScoredPrompts(plan)
        logprobs = self._decode(plan) if is_decode else self._mixed(plan, prompts)
        tokens = self._received[self._turn][: len(plan.sampling)]
        tokens.copy_(self._tokens[: len(tokens)], non_blocking=True)
        done = None
        if self._on_cuda:
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return _Enqueued(tokens, done, logprobs, prompts)

    def prefers_whole(self, num_tokens: int) -> bool:
        """See `ModelRunner`."""
        return self._has_whole_prompts and is_worth_it(0, num_tokens)

    def close(self) -> None:
        """See `ModelRunner`: graphs keep their memory, and the cache's."""
        self._graphs.clear()
        self._requests.clear()
        self._sent, self._received = [], []
        self._inbox = self._tokens = self._logprobs = self._counters = torch.empty(0)

    def _load(self, request: Request) -> None:
        slot = request.slot
        self.state.load(request)
        self.device_state.load(slot, self.state, request.token_ids[-1])
        self._requests[slot], self._behind[slot], self._prefixes_of = request, False, None
        self._edits.load(request)

    def _launch_on_host(self, plan: StepPlan) -> Launched:
        """A step whose logits the host must see; everything before it has been committed."""
        for slot in plan.slots[self._behind[plan.slots]].tolist():
            request = self._requests[slot]
            assert request is not None
            self.state.load(request)
        self._behind[plan.slots] = False
        return self._compute(plan)

    def _draw(
        self, logits: Tensor, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """As on the device, so that a request gets the same tokens whatever runs beside it."""
        device_slots, device_positions = self._send([slots, positions], slots)
        self._sample(logits, device_slots, device_positions)
        return self._tokens[: len(slots)].cpu().numpy().astype(np.int64)

    def _decode(self, plan: StepPlan) -> Logprobs | None:
        """A step of decodes that all sample."""
        rows = len(plan.slots)
        size = self._size(rows)
        batch = _padding(size)
        batch[1, :rows], batch[2, :rows], batch[3, :rows] = plan.slots, plan.starts, plan.starts + 1
        sections: list[_Array] = [batch.ravel()]
        if prefixes := self._find_prefixes(plan):
            shared = plan_prefixes(prefixes, plan.slots, size, self._group, self._num_shared_items)
            sections += [part.ravel() for part in shared]
        variant = _Variant(size, shared=bool(prefixes), samples=not self._is_edited(plan))
        received = self._send(sections, plan.slots)
        logits = self._run(variant, received)
        if logits is None:
            return None
        _, device_slots, _, next_positions = received[0].view(4, -1)
        return self._edit_and_sample(plan, logits, device_slots, next_positions)

    def _decode_step(self, variant: _Variant, received: list[Tensor]) -> Tensor:
        """The logits of a step of decodes."""
        batch, *rest = received
        ids, slots, positions, _ = batch.view(4, -1)
        inputs = self._inputs(ids, slots, positions, DecodeRows(slots, positions, self._counters))
        if variant.shared:
            rows, items, members = rest
            inputs.shared = SharedPrefixes(rows.view(-1, 4), items.view(self._num_shared_items, -1), members)
        return self.paged_model.compute(inputs)

    def _mixed(self, plan: StepPlan, scored: ScoredPrompts) -> Logprobs | None:
        """A step with chunks of prompts in it, or with more than a graph has room for."""
        starts, counts, slots, samples = plan.starts, plan.counts, plan.slots, plan.samples
        ends, singles, rows = np.cumsum(counts), int((counts == 1).sum()), int(samples.sum())
        variant = self._mixed_variant(plan, singles)
        offsets, at = ends - counts, np.arange(ends[-1])  # in the batch
        token_slots = np.repeat(slots, counts)
        positions = at + np.repeat(starts - offsets, counts)
        ids = self.state.tokens[token_slots, positions]
        ids[:singles][samples[:singles]] = -1  # perhaps sampled by the step before
        if variant is not None:
            for place in offsets, at:
                place[singles:] += variant.rows - singles
        prompts, chunks_at = self._whole_prompts(plan, offsets, singles)
        tile_rows, tile_indices = plan_tiles(starts[chunks_at], counts[chunks_at], self._group)
        sizes = _Sizes(singles, len(at), rows + len(scored.places), len(chunks_at), len(tile_rows))
        if variant is not None:
            sizes = self._room(variant)
        tokens, sampled, chunks, tiles = parts = _blank(sizes)
        tokens[:, at] = ids, token_slots, positions
        next_positions = (starts + counts)[samples]
        sampled[:, :rows] = (offsets + counts - 1)[samples], slots[samples], next_positions - 1, next_positions
        sampled[:3, rows : rows + len(scored.places)] = scored.places, scored.slots, scored.positions
        chunks[:, : len(chunks_at)] = np.stack([slots, starts, counts, offsets])[:, chunks_at]
        tiles[:, : len(tile_rows)] = tile_rows, tile_indices
        received = self._send([row for part in parts for row in part], slots)
        if variant is None:
            both = self._mixed_step(singles, received, prompts)
            scored.look_up(both[rows:])
            logits = both[:rows] if rows else None
        else:
            logits = self._run(variant, received)  # None: it samples
        if logits is None:
            return None
        sampled_slots, positions_then = (part[: len(logits)] for part in received[4:7:2])
        if self._is_edited(plan):
            return self._edit_and_sample(plan, logits, sampled_slots, positions_then)
        self._sample(logits, sampled_slots, positions_then)
        return None

    def _mixed_step(self, singles: int, received: list[Tensor], prompts: Sequence[tuple[int, int, int]] = ()) -> Tensor:
        """The logits of a step with chunks."""
        ids, slots, positions, at, sampled_slots, sampled_positions, _, *chunks = received
        decodes = DecodeRows(slots[:singles], positions[:singles], self._counters) if singles else None
        inputs = self._inputs(ids, slots, positions, decodes, PrefillRows(*chunks) if len(chunks[0]) else None)
        inputs.prompts = prompts
        inputs.sampled = DecodeRows(sampled_slots, sampled_positions, self._counters)
        inputs.sampled_at = at.long()
        return self.paged_model.compute(inputs)

    def _mixed_variant(self, plan: StepPlan, singles: int) -> _Variant | None:
        """Which graph has room for a step with chunks, if one has; all of these sample, so that few are to be kept."""
        chunks = plan.counts[singles:]
        tokens = max(int(chunks.sum()), len(chunks) * _TOKENS_A_CHUNK)
        fitting = [size for size in self._mixed_sizes if size[0] >= singles and size[1] >= tokens]
        if plan.scoring or not fitting or self._is_edited(plan):
            return None
        return _Variant(*min(fitting, key=sum))

    def _room(self, variant: _Variant) -> _Sizes:
        """What a graph of steps with chunks is captured for; tiles that are none belong to one more, empty chunk."""
        chunks, tile = variant.tokens // _TOKENS_A_CHUNK, ROWS // self._group
        sampled = min(variant.rows + chunks, len(self._tokens))
        return _Sizes(
            variant.rows, variant.rows + variant.tokens, sampled, chunks + 1, -(-variant.tokens // tile) + chunks
        )

    def _whole_prompts(
        self, plan: StepPlan, offsets: npt.NDArray[np.int64], singles: int
    ) -> tuple[list[tuple[int, int, int]], npt.NDArray[np.int64]]:
        """`StepInputs.prompts`, and the other rows that are not single tokens."""
        rows = np.arange(singles, len(plan.slots))
        if not self._has_whole_prompts:
            return [], rows
        prompts: list[tuple[int, int, int]] = []
        whole = [is_worth_it(plan.starts[row], plan.counts[row]) for row in rows.tolist()]
        for row in rows[whole].tolist():
            offset, count = int(offsets[row]), int(plan.counts[row])
            if prompts and prompts[-1][2] == count and prompts[-1][0] + prompts[-1][1] * count == offset:
                prompts[-1] = prompts[-1][0], prompts[-1][1] + 1, count
            else:
                prompts.append((offset, 1, count))
        return prompts, rows[np.logical_not(whole)]

    def _inputs(
        self,
        ids: Tensor,
        slots: Tensor,
        positions: Tensor,
        decodes: DecodeRows | None,
        chunks: PrefillRows | None = None,
    ) -> StepInputs:
        tables = self.device_state.block_tables
        input_ids, slot_mapping = locate_tokens(
            ids, slots, positions, self.device_state.sampling.last_token, tables, self.tables.block_size
        )
        return StepInputs(input_ids, positions, slot_mapping, tables, decodes, chunks)

    def _sample(self, logits: Tensor, slots: Tensor, positions: Tensor) -> None:
        rows = len(slots)
        sample(logits, slots, positions, self.device_state.sampling, self._tokens[:rows], self._logprobs[:rows])

    def _is_edited(self, plan: StepPlan) -> bool:
        """Whether any row's logits are to be changed, or looked at, before it samples."""
        slots, positions = plan.slots[plan.samples], (plan.starts + plan.counts)[plan.samples]
        return self._edits.wanted(slots, positions)

    def _edit_and_sample(self, plan: StepPlan, logits: Tensor, slots: Tensor, positions: Tensor) -> Logprobs:
        """`slots` and `positions` are of the rows of `logits`, which may be more than those of the plan."""
        logprobs = Logprobs(logits, asked(plan.sampling))
        host_slots, host_positions = plan.slots[plan.samples], (plan.starts + plan.counts)[plan.samples]
        self._edits.apply(logits, plan.sampling, host_slots, host_positions, slots)
        self._sample(logits, slots, positions)
        self._edits.count(self._tokens[: len(slots)], slots)
        logprobs.look_up(self._tokens)
        return logprobs

    # ---- what the host sends

    def _size(self, rows: int) -> int:
        """Rows to which a batch of decodes is padded."""
        if not self._pads:
            return rows
        size = next((size for size in _SIZES if size >= rows), -(-rows // _SIZES[-1]) * _SIZES[-1])
        return min(size, len(self._tokens))

    def _find_prefixes(self, plan: StepPlan) -> list[tuple[npt.NDArray[np.int64], int]]:
        """Searched anew when requests have come or gone; what the others share does not change."""
        key = plan.slots.tobytes()
        if key != self._prefixes_of:
            self._prefixes_of, self._prefixes = key, []
            if self._num_shared_items:
                tables = self.tables.array[0, plan.slots]
                self._prefixes = find_prefixes(tables, plan.starts, self.tables.block_size)
        return self._prefixes

    def _send(self, sections: list[_Array], slots: npt.NDArray[np.int64]) -> list[Tensor]:
        """Copy sections of int32 to the device in one go, and apply what changed there; returns where they are."""
        changes = self.device_state.take_changes(slots).ravel()
        host = self._sent[self._turn].numpy()
        *starts, end = np.cumsum([0] + [-(-section.size // 4) * 4 for section in sections]).tolist()  # 16 bytes aligned
        if end + changes.size > host.size:  # many long prompts at once
            apply_changes(self.device_state.tensor, torch.from_numpy(changes).to(self.device).view(-1, 2))
            changes = changes[:0]
        for start, section in zip(starts, sections, strict=True):
            host[start : start + section.size] = section
        total = end + changes.size
        host[end:total] = changes
        self._inbox[:total].copy_(self._sent[self._turn][:total], non_blocking=True)
        if changes.size:
            apply_changes(self.device_state.tensor, self._inbox[end:total].view(-1, 2))
        return [self._inbox[start : start + len(section)] for start, section in zip(starts, sections, strict=True)]

    # ---- graphs

    def _prepare(self, num_slots: int) -> None:
        """Compile what steps of decodes need, and capture a graph for each size."""
        began = time.perf_counter()
        none = np.zeros(0, dtype=np.int64)
        variants = [_Variant(*size) for size in self._mixed_sizes]
        variants += [_Variant(size) for size in {self._size(size) for size in (*_SIZES, num_slots)}]

        def run() -> None:
            for variant in variants:  # that each overwrites what is sent for the others does not matter here
                self._step(variant, self._send(self._nothing(variant), none))

        compiled = compile_ahead(run, self.device, launched=(locate,))
        logger.info("%d kernels ready after %.1f s", compiled, time.perf_counter() - began)
        if not self._cuda_graphs:
            return
        variants.sort(key=lambda one: -(one.rows + one.tokens))  # the others fit into the memory of the largest
        for variant in variants:
            self._run(variant, self._send(self._nothing(variant), none))
        logger.info("%d CUDA graphs ready after %.1f s", len(variants), time.perf_counter() - began)

    def _nothing(self, variant: _Variant) -> list[_Array]:
        """What is sent for a step of padding alone."""
        if variant.tokens:
            return [row for part in _blank(self._room(variant)) for row in part]
        return [_padding(variant.rows).ravel()]

    def _run(self, variant: _Variant, received: list[Tensor]) -> Tensor | None:
        """Run a step that has, or gets, a graph; returns its logits if it does not sample."""
        if variant in self._graphs:
            graph, logits = self._graphs[variant]
            graph.replay()
            return logits
        logits = self._step(variant, received)  # this also loads kernels, which a capture must not
        if self._cuda_graphs:
            self._capture(variant, received)
        return logits

    def _step(self, variant: _Variant, received: list[Tensor]) -> Tensor | None:
        """All that the device does for `_run`."""
        if variant.tokens:
            logits, (slots, next_positions) = self._mixed_step(variant.rows, received), received[4:7:2]
        else:
            logits, (_, slots, _, next_positions) = self._decode_step(variant, received), received[0].view(4, -1)
        if not variant.samples:
            return logits
        self._sample(logits, slots, next_positions)
        return None

    def _capture(self, variant: _Variant, received: list[Tensor]) -> None:
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = self._step(variant, received)
        self._graphs[variant] = graph, logits


def _blank(sizes: _Sizes) -> tuple[npt.NDArray[np.int32], ...]:
    """What is sent for a step with chunks, of padding alone: ids, slots and positions of tokens; places, slots,
    positions and next positions of those that sample; `PrefillRows` of chunks and of tiles."""
    tiles = np.zeros((2, sizes.tiles), dtype=np.int32)
    tiles[0] = sizes.chunks - 1
    return _padding(sizes.tokens)[:3], _padding(sizes.sampled), np.zeros((4, sizes.chunks), dtype=np.int32), tiles


def _padding(rows: int) -> npt.NDArray[np.int32]:
    """Id, slot, position and next position of `rows` that are not there: their K and V go to block 0."""
    return np.repeat(np.array([[-1], [-1], [0], [0]], dtype=np.int32), rows, axis=1)
