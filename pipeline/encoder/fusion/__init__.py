"""Fewer passes over memory: BatchNorm, sums and activations as parts of the convolutions."""
