"""Which tokens run next. Pure Python: imports no torch, so it can be tested and simulated by the million."""
