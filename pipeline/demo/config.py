"""Every default of the demo. Imports nothing heavy, since `--help` shows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.extraction.config import BACKBONE_HELP, BACKBONES
from train.config import DEVICE_HELP
from train.option import option


@dataclass(frozen=True)
class DemoConfig:
    """The settings of `cap demo`, of which its options are some."""

    out: Path = option(Path("demo"), "Folder to work in.")
    backbone: str = option("shufflenet_v2_x0_5", BACKBONE_HELP, usual=BACKBONES)
    weights: str | None = option(
        None,
        "As for `cap extract-features`.  [default: the demo's own, or ImageNet's for another "
        "backbone]",
    )
    train_scenes: int = 600
    test_scenes: int = 150
    epochs: int = option(16, "Passes over the training captions.", min=1)
    # There are only three thousand captions of a hundred different words: small batches turn them
    # into enough steps, and half the usual hidden size learns them in a third of the time.
    batch_size: int = 32  # captions
    hidden_size: int = 256
    learning_rate: float = 0.002
    dropout: float = 0.2
    device: str = option("auto", DEVICE_HELP)
