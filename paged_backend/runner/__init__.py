"""Runs a step on the device: model loading, the attention plug, the batch state and sampling."""
