"""Whole runs: the training loop, validation, what a run leaves behind; and sweeps."""
