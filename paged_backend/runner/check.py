"""Two forwards made once, before serving: is the paged model right, and how much memory does the largest step take?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from paged_backend.config import EngineConfig
from paged_backend.errors import UnsupportedModel
from paged_backend.runner.attention import using_eager
from paged_backend.runner.batch import FlatBatch
from paged_backend.runner.model import PagedModel

_SCRATCH_BLOCKS = 64
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


def verify(paged_model: PagedModel, block_size: int) -> None:
    """Compare paged logits with the model's own on two short prompts, prefilled together and then decoded.

    Catches what the probe cannot see, such as state kept outside attention (Mamba, convolutions). Raises
    `UnsupportedModel` with the difference.
    """
    model = paged_model.model
    seen = rehearse(paged_model, block_size)
    differences = []
    with using_eager(model), torch.inference_mode():
        for prompt, logits in seen:
            own = model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False).logits[0, -1].float()
            differences.append(float((logits - own).abs().max() / own.abs().max()))
    tolerance = _TOLERANCE.get(paged_model.dtype, 2e-3)
    if not all(difference <= tolerance for difference in differences):  # so that NaN fails too
        worst = max(differences, key=lambda difference: float("inf") if difference != difference else difference)
        raise UnsupportedModel(
            f"{type(model).__name__} ({model.config.model_type}) computes other logits over a paged cache than on its "
            f"own: relative difference {worst:.2g}, allowed {tolerance:g}; it may keep state outside attention"
        )


def rehearse(paged_model: PagedModel, block_size: int) -> list[tuple[list[int], Tensor]]:
    """Prefill two short prompts, decode once, then once more the first alone: prompts so far, and their logits."""
    vocab = paged_model.model.config.get_text_config().vocab_size
    first, second = ([(7 * i + 3 * row) % (vocab - 4) + 3 for i in range(length)] for row, length in enumerate((12, 5)))
    rounds = [([first[:-2], second[:-1]], [0, 0]), ([first[:-1], second], [10, 4]), ([first], [11])]
    width = -(-12 // block_size)
    num_blocks = 2 * width * len(paged_model.groups)
    seen: list[tuple[list[int], Tensor]] = []
    with _scratch_cache(paged_model, num_blocks, block_size):
        for prompts, starts in rounds:
            logits = _forward(paged_model, prompts, starts, _tables(paged_model, 2, width, num_blocks), block_size)
            seen += zip(prompts, logits, strict=True)
    return seen


def peak_step_bytes(paged_model: PagedModel, config: EngineConfig, max_model_len: int) -> int:
    """CUDA memory that steps take at most beyond what is allocated already.

    Measured on a budget full of short prompts, sampled, and on the last chunk of the longest prompt; all of them write
    to the same few blocks. A second sampled batch is for CUDA graphs, which keep theirs.
    """
    device, block_size = paged_model.device, config.block_size
    budget, rows = config.step_tokens, config.max_num_seqs
    steps = [(budget // rows, 0, rows), (max_model_len, max(0, max_model_len - budget), 1)]
    peak = 0
    with _scratch_cache(paged_model, _SCRATCH_BLOCKS, block_size):
        for length, start, count in steps:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            tables = _tables(paged_model, count, -(-length // block_size), _SCRATCH_BLOCKS)
            logits = _forward(paged_model, [[1] * length] * count, [start] * count, tables, block_size)
            sampled = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
            reserve = sampled.numel() * sampled.element_size() if config.cuda_graphs else 0
            peak = max(peak, torch.cuda.max_memory_allocated(device) - before + reserve)
            del logits, sampled
    torch.cuda.empty_cache()
    return peak


@contextlib.contextmanager
def _scratch_cache(paged_model: PagedModel, num_blocks: int, block_size: int) -> Iterator[None]:
    """A cache of its own for forwards before serving."""
    paged_model.allocate(num_blocks, block_size)
    try:
        yield
    finally:
        paged_model.storage = None


def _tables(paged_model: PagedModel, rows: int, width: int, num_blocks: int) -> npt.NDArray[np.int32]:
    """`[groups, rows, width]` block ids, the same again where there are fewer blocks."""
    count = len(paged_model.groups) * rows * width
    return (np.arange(count, dtype=np.int32) % num_blocks + 1).reshape(-1, rows, width)


def _forward(
    paged_model: PagedModel,
    prompts: Sequence[Sequence[int]],
    starts: list[int],
    tables: npt.NDArray[np.int32],
    block_size: int,
) -> Tensor:
    """Last-token logits of prompts, cached before `starts`, in the first rows of the tables."""
    tables = tables[:, : len(prompts)]
    counts = [len(prompt) - start for prompt, start in zip(prompts, starts, strict=True)]
    row = np.repeat(np.arange(len(prompts)), counts)
    positions = np.concatenate([np.arange(start, len(prompt)) for prompt, start in zip(prompts, starts, strict=True)])
    flat = FlatBatch(
        input_ids=np.concatenate([np.array(prompt[start:]) for prompt, start in zip(prompts, starts, strict=True)]),
        positions=positions,
        slot_mapping=tables[:, row, positions // block_size].astype(np.int64) * block_size + positions % block_size,
        block_tables=tables,
        logits_at=np.cumsum(counts) - 1,
    )
    return paged_model.forward(flat, starts, counts)
