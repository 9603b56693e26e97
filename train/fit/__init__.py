"""Many steps: the training loop, the run folder, validation, and sweeps over runs."""
