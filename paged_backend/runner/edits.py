"""What requests want changed in their logits before a token is chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from paged_backend.request import Request
from paged_backend.runner.penalties import Penalties


class LogitsEdits:
    """Masks, bias, forbidden tokens and penalties, for the requests that want any.

    `kernels` is `paged_kernels.logits`, or its counterpart for GPUs. The order is vLLM's: penalties come last.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device, kernels: ModuleType) -> None:
        self._vocab_size, self._device, self._mask = vocab_size, device, kernels.mask
        self._penalties = Penalties(num_slots, vocab_size, device, kernels)
        self._always = np.zeros(num_slots, dtype=np.bool_)
        """Slots whose logits are changed, or looked at, in every step."""
        self._until = np.zeros(num_slots, dtype=np.int64)
        """Where the first stop token of a slot may stand."""
        self._allowed: dict[int, npt.NDArray[np.int32]] = {}
        """Of the slots that have `allowed_token_ids`: a bit a token."""

    def load(self, request: Request) -> None:
        """A request got its slot."""
        slot, params = request.slot, request.params
        self._penalties.load(request)
        self._allowed.pop(slot, None)
        if params.allowed_token_ids is not None:
            self._allowed[slot] = _bits(params.allowed_token_ids, self._vocab_size)
        self._always[slot] = (
            bool(params.penalised or params.logit_bias or request.bad_words or params.allowed_token_ids)
            or request.grammar is not None
            or params.logprobs is not None
        )
        self._until[slot] = request.num_prompt_tokens + params.min_tokens if request.stop_token_ids else 0

    def wanted(self, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> bool:
        """Whether logits are changed or looked at before the tokens are chosen that will stand at `positions`."""
        return bool(self._always[slots].any() or (positions < self._until[slots]).any())

    def apply(
        self,
        logits: Tensor,
        requests: Sequence[Request],
        slots: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        device_slots: Tensor,
    ) -> None:
        """Change them in place.

        Row i of `logits` `[rows, vocab]` is of `requests[i]` in `slots[i]`; `device_slots` `[rows]` int32 has the slots
        again, and -1 for rows beyond those of `requests`.
        """
        masks: dict[int, npt.NDArray[np.int32]] = {}
        biased: list[tuple[int, int, float]] = []
        forbidden: list[tuple[int, int]] = []
        for row, (request, slot, position) in enumerate(zip(requests, slots.tolist(), positions.tolist(), strict=True)):
            if position < self._until[slot]:
                forbidden += [(row, token) for token in request.stop_token_ids]
            if not self._always[slot]:
                continue
            if (allowed := self._allowed_next(request, slot)) is not None:
                masks[row] = allowed
            biased += [(row, token, value) for token, value in request.params.logit_bias.items()]
            forbidden += [(row, token) for token in _ends_of_bad_words(request)]
        if masks:
            rows = torch.tensor(list(masks), dtype=torch.int32, device=self._device)
            self._mask(logits, rows, torch.from_numpy(np.stack(list(masks.values()))).to(self._device))
        if biased:
            *where, values = map(self._on_device, zip(*biased, strict=True))
            logits[tuple(where)] = (logits[tuple(where)] + values).to(logits.dtype)
        if forbidden:
            logits[tuple(map(self._on_device, zip(*forbidden, strict=True)))] = float("-inf")
        self._penalties.apply(logits, device_slots)

    def count(self, tokens: Tensor, device_slots: Tensor) -> None:
        """The tokens chosen, `[rows]` int32, so that penalties know them."""
        self._penalties.count(tokens, device_slots)

    def _allowed_next(self, request: Request, slot: int) -> npt.NDArray[np.int32] | None:
        allowed = self._allowed.get(slot)
        if request.grammar is None:
            return allowed
        row = np.zeros(-(-self._vocab_size // 32), dtype=np.int32)
        request.grammar.fill(row)
        return row if allowed is None else row & allowed

    def _on_device(self, values: Sequence[int] | Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self._device)


def any_allowed(request: Request, vocab_size: int) -> bool:
    """Whether the masks of `apply` leave the request a next token; slow, as it is asked only of those that got none."""
    params, words = request.params, np.full(-(-vocab_size // 32), -1, dtype=np.int32)
    if params.allowed_token_ids is not None:
        words = _bits(params.allowed_token_ids, vocab_size)
    if request.grammar is not None:
        row = np.zeros_like(words)
        request.grammar.fill(row)
        words = words & row
    flags = np.unpackbits(words.view(np.uint8), bitorder="little", count=vocab_size)
    if request.num_output_tokens < params.min_tokens:
        flags[list(request.stop_token_ids)] = 0
    flags[list(_ends_of_bad_words(request))] = 0
    return bool(flags.any())


def _ends_of_bad_words(request: Request) -> Iterator[int]:
    """Tokens that may not come next."""
    if request.bad_words:
        output = request.token_ids[request.num_prompt_tokens :]
        yield from (word[-1] for word in request.bad_words if _ends_with(output, word[:-1]))


def _bits(token_ids: Sequence[int], vocab_size: int) -> npt.NDArray[np.int32]:
    flags = np.zeros(-(-vocab_size // 32) * 32, dtype=np.bool_)
    flags[list(token_ids)] = True
    return np.packbits(flags, bitorder="little").view(np.int32)


def _ends_with(tokens: list[int], end: tuple[int, ...]) -> bool:
    return not end or tuple(tokens[-len(end) :]) == end
