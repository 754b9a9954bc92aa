"""Who owns which block. Pure Python and numpy, but for `capacity`, which measures the device."""
