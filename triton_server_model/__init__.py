"""Serves the engine from a Triton Inference Server."""
