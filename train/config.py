"""Every default of training and decoding. Imports nothing heavy: `--help` shows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class FitConfig:
    """What the training loop itself needs."""

    epochs: int = 10
    batch_size: int = 128  # captions
    learning_rate: float = 0.001  # Adam
    clip_norm: float = 5.0  # of all gradients together; healthy training stays below
    seed: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """What `cap train` does by default, and everything it can be told."""

    from_cache: Path
    out: Path
    val_cache: Path | None = None
    val_share: float = 0.05  # of the photos, held out where there is no val_cache
    embedding_size: int = 256
    hidden_size: int = 512
    num_layers: int = 1
    dropout: float = 0.5
    min_count: int = 4
    max_length: int = 50  # words of a caption; the rest is cut
    fit: FitConfig = field(default_factory=FitConfig)
    save_every: int = 1000  # steps
    log_every: int = 10  # steps
    device: str = "auto"
    resume: bool = False
    overwrite: bool = False


# What a photo is captioned from: its full view, the mean of the views its encoder makes, or
# whichever of them the model was made for.
FULL, MEAN, AUTO = "full", "mean", "auto"


@dataclass(frozen=True)
class SearchConfig:
    """How captions are looked for."""

    beam_size: int = 3  # 1 is greedy search
    max_length: int = 30  # words
    length_penalty: float = 0.7  # 0 prefers short captions, 1 compares the mean per word
    no_repeat_ngram: int = 0  # no so many words in a row twice in a caption; 0: let them
    captions: int = 1  # a photo, best first
    groups: int = 1  # of beams that avoid one another's words
    diversity: float = 0.5  # log-probability that a word of an earlier group costs
    sample: bool = False  # draw words instead of searching
    temperature: float = 1.0  # of drawing: below 1 keeps to likely words
    top_p: float = 1.0  # draw among the likeliest words of this share
    seed: int = 0  # of drawing
    view: str = AUTO
