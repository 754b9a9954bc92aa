"""Names of block contents: a chained hash of all tokens up to the end of the block."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

_BYTES = 16


def root(salt: str) -> bytes:
    """Where the chain of a request with this salt begins; other salts never meet."""
    return blake2b(salt.encode(errors="surrogatepass"), digest_size=_BYTES, person=b"paged-backend").digest()


def extend(hashes: list[bytes], start: bytes, token_ids: Sequence[int], block_size: int) -> None:
    """Append the hashes of the full blocks of `token_ids` that `hashes` lacks; `start` comes from `root`.

    BLAKE2b (RFC 7693), so that nobody can craft a prompt that finds the blocks of another.
    """
    known, full = len(hashes), len(token_ids) // block_size
    if known >= full:
        return
    tokens = array("i", token_ids[known * block_size : full * block_size]).tobytes()
    size = len(tokens) // (full - known)
    parent = hashes[-1] if hashes else start
    for at in range(0, len(tokens), size):
        parent = blake2b(parent + tokens[at : at + size], digest_size=_BYTES).digest()
        hashes.append(parent)
