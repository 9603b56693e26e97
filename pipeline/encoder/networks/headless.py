"""A network without its head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pipeline.photos.preprocessing import IMAGENET, Preprocessing


@dataclass(frozen=True)
class Headless:
    """A network whose output is its features: (B, 3, S, S) normalized floats → (B, feature_dim)."""

    network: nn.Module
    feature_dim: int
    preprocessing: Preprocessing = IMAGENET
    image_size: int = 224  # what it was trained for, both sides
