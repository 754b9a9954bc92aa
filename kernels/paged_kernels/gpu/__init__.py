"""Triton-language kernels for CUDA GPUs, each beside its plain PyTorch reference."""
