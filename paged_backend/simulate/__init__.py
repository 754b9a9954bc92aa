"""The real scheduler and block accounting on a device that is a formula. Imports no torch."""
