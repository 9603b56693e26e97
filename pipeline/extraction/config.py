"""Every default of extraction. Imports nothing heavy: `--help` shows them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


def parse_shard(text: str) -> tuple[int, int]:
    """`2/8` → (2, 8). Raises ValueError."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"{text!r} is not I/N with 1 ≤ I ≤ N, as in 2/8")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class ExtractConfig:
    """What `cap extract-features` does by default, and everything it can be told."""

    images: Path
    out: Path
    captions: Path | None = None
    split: str | None = None
    only: Path | None = None
    backbone: str = "resnet152"
    weights: str = "IMAGENET1K_V1"
    views: tuple[str, ...] = ("full",)
    image_size: int = 224
    batch_size: int | None = None  # photos; None: 16 on a CPU, 256 on a GPU
    workers: int | None = None  # decoding threads; None: one per core
    device: str = "auto"
    precision: str = "auto"
    limit: int | None = None
    shard: tuple[int, int] | None = None  # (I, N): the I-th of N shares
    reuse: Path | None = None  # an older cache of the same encoder
    overwrite: bool = False
    retry_unreadable: bool = False


@dataclass(frozen=True)
class DemoConfig:
    """What `cap demo` does by default, and everything it can be told."""

    out: Path = Path("demo")
    backbone: str = "shufflenet_v2_x0_5"
    weights: str | None = None  # None: the demo's own, or ImageNet's for another backbone
    train_scenes: int = 600
    test_scenes: int = 150
    epochs: int = 16
    # Three thousand captions of a hundred words: small batches make enough steps of them, and half
    # the usual hidden size holds them at a third of the time.
    batch_size: int = 32  # captions
    hidden_size: int = 256
    learning_rate: float = 0.002
    dropout: float = 0.2
    device: str = "auto"
