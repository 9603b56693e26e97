"""Whole runs: the training loop, validation, the run folder, and sweeps over many runs."""
