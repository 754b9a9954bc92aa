"""The peer everyone has: `model.generate` of transformers, with static batches chosen in its favour."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from paged_backend.bench.workloads import Workload
from paged_backend.runner.loader import resolve_device


class HfPeer:
    """Plain transformers. Rows are sorted by output length, so that a batch wastes few steps."""

    name = "transformers generate"

    def __init__(self, model: Path, dtype: str, device: str, batch_sizes: list[int]) -> None:
        start = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, use_safetensors=True)
        self.model.eval().to(resolve_device(device))
        self.load_seconds = time.perf_counter() - start
        self.batch_sizes = batch_sizes
        """To try; empty: the whole workload at once, and in two halves."""
        self.batch_size = 0  # chosen by warm_up
        self.settings: dict[str, object] = {}

    def warm_up(self, workload: Workload) -> None:
        """Run every batch size once and keep the fastest."""
        total = len(workload.requests)
        self._run(replace(workload, requests=[(prompt, 2) for prompt, _ in workload.requests[:2]]), 2)
        tried: dict[int, float] = {}
        for size in {min(size, total) for size in self.batch_sizes or (total, (total + 1) // 2)}:
            tried |= self._try(workload, size)
        self.batch_size = min(tried, key=lambda size: tried[size])
        self.settings = {
            "batch_size": self.batch_size,
            "tried_seconds": {str(size): round(seconds, 3) for size, seconds in tried.items()},
        }

    def _try(self, workload: Workload, size: int) -> dict[int, float]:
        """Seconds by batch size: of `size`, or of the first of its halves that fits in memory."""
        start = time.perf_counter()
        try:
            self._run(workload, size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        else:
            return {size: time.perf_counter() - start}
        torch.cuda.empty_cache()
        return self._try(workload, size // 2)

    def reset(self) -> None:
        """Nothing is left behind."""

    def run(self, workload: Workload) -> None:
        """Every request of the workload, whole."""
        self._run(workload, self.batch_size)

    def _run(self, workload: Workload, batch_size: int) -> None:
        sampling: dict[str, object] = {"do_sample": False}
        if workload.temperature:
            sampling = {"do_sample": True, "temperature": workload.temperature, "top_p": workload.top_p}
            sampling["top_k"] = 0  # not transformers' default
        rows = sorted(workload.requests, key=lambda request: (request[1], len(request[0])))
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            width = max(len(prompt) for prompt, _ in batch)
            length = batch[-1][1]
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in batch])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch])
            made = self.model.generate(
                ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                **sampling,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=0,
            ).cpu()
            if made.shape != (len(batch), width + length):
                raise RuntimeError(f"{self.name} made {tuple(made.shape)}, not {(len(batch), width + length)}")
