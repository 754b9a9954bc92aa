"""Two forwards made once, before serving: is the paged model right, and how much memory does the largest step take?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from paged_backend.config import EngineConfig
from paged_backend.errors import UnsupportedModel
from paged_backend.runner.attention import using_eager
from paged_backend.runner.batch import FlatBatch
from paged_backend.runner.model import PagedModel

_TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


def verify(paged_model: PagedModel, block_size: int) -> None:
    """Compare paged logits with the model's own on two short prompts, prefilled together and then decoded once.

    Catches what the probe cannot see, such as state kept outside attention (Mamba, convolutions). Raises
    `UnsupportedModel` with the difference.
    """
    model = paged_model.model
    rounds, logits_of_rounds = rehearse(paged_model, block_size)
    differences = []
    with using_eager(model), torch.inference_mode():
        for prompt, logits in zip(rounds[0] + rounds[1], torch.cat(logits_of_rounds), strict=True):
            own = model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False).logits[0, -1].float()
            differences.append(float((logits - own).abs().max() / own.abs().max()))
    tolerance = _TOLERANCE.get(paged_model.dtype, 2e-3)
    if not all(difference <= tolerance for difference in differences):  # so that NaN fails too
        worst = max(differences, key=lambda difference: float("inf") if difference != difference else difference)
        raise UnsupportedModel(
            f"{type(model).__name__} ({model.config.model_type}) computes other logits over a paged cache than on its "
            f"own: relative difference {worst:.2g}, allowed {tolerance:g}; it may keep state outside attention"
        )


def rehearse(paged_model: PagedModel, block_size: int) -> tuple[list[list[list[int]]], list[Tensor]]:
    """Prefill two short prompts, then decode once; returns what was seen by each round's end, and its logits."""
    vocab = paged_model.model.config.get_text_config().vocab_size
    prompts = [[(7 * i + 3 * row) % (vocab - 4) + 3 for i in range(length)] for row, length in enumerate((11, 5))]
    rounds = [[prompt[:-1] for prompt in prompts], prompts]
    width = -(-11 // block_size)
    with _scratch_cache(paged_model, 2 * width, block_size):
        starts = [[0, 0], [len(prompt) - 1 for prompt in prompts]]
        return rounds, [_forward(paged_model, rounds[i], starts[i], width, block_size) for i in (0, 1)]


def peak_step_bytes(paged_model: PagedModel, config: EngineConfig, max_model_len: int) -> int:
    """CUDA memory that steps take at most beyond what is allocated already.

    Measured on a budget full of short prompts, sampled, and on the last chunk of the longest prompt.
    """
    device, block_size = paged_model.device, config.block_size
    budget, rows = config.step_tokens, config.max_num_seqs
    steps = [(budget // rows, 0, rows), (max_model_len, max(0, max_model_len - budget), 1)]
    peak = 0
    for length, start, count in steps:
        width = -(-length // block_size)
        with _scratch_cache(paged_model, count * width, block_size):
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            logits = _forward(paged_model, [[1] * length] * count, [start] * count, width, block_size)
            logits.softmax(-1).cumsum(-1, dtype=torch.float64)
            peak = max(peak, torch.cuda.max_memory_allocated(device) - before)
            del logits
    torch.cuda.empty_cache()
    return peak


@contextlib.contextmanager
def _scratch_cache(paged_model: PagedModel, num_blocks: int, block_size: int) -> Iterator[None]:
    """A cache of its own for forwards before serving, with `num_blocks` for each group."""
    paged_model.allocate(num_blocks * len(paged_model.groups), block_size)
    try:
        yield
    finally:
        paged_model.storage = None


def _forward(
    paged_model: PagedModel, prompts: Sequence[Sequence[int]], starts: list[int], width: int, block_size: int
) -> Tensor:
    """Last-token logits of prompts, cached before `starts`; each prompt has `width` blocks of its own in each group."""
    shape = (len(paged_model.groups), len(prompts), width)
    tables = np.arange(1, np.prod(shape) + 1, dtype=np.int32).reshape(shape)
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
