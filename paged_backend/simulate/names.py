"""Words of the command line. Imports nothing, so that `--help` is quick."""

PAGED, CONTIGUOUS_MAX, POWER_OF_TWO = "paged", "contiguous-max", "power-of-two"
RESERVATIONS = (PAGED, CONTIGUOUS_MAX, POWER_OF_TWO)
"""How a request gets memory; see `reservation`."""
ALLOCATORS = ("buddy", "first-fit")
"""Of the reservations that are not paged."""
NOISY = "noisy"
"""The tenant of `trace.burst`."""
SHAREGPT_PROMPT, SHAREGPT_OUTPUT = 161.31, 337.99
"""Mean tokens of the ShareGPT requests in the vLLM paper (arXiv 2309.06180, figure 11)."""
