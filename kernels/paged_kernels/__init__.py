"""Kernels over a paged KV cache, each beside a plain PyTorch reference. Knows nothing of the engine."""
