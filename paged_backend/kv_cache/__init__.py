"""Who owns which block. Pure Python and numpy: imports no torch."""
