import torch

RUNS = 2 if torch.cuda.is_available() else 1
"""How often a kernel runs on the same inputs, for the same bits: the interpreter knows one order of its programs."""
