"""Every default of training and decoding. Imports nothing heavy: `--help` shows them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cache.errors import CapError


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes a model and its training, whatever the data."""

    # The decoder.
    embedding_size: int = 256
    hidden_size: int = 512
    num_layers: int = 1
    tie_embeddings: bool = False  # a word is read and written by the same vector
    photo_every_step: bool = False  # the LSTM reads the photo with each word, not before them alone
    dropout: float = 0.0  # on the LSTM's inputs and outputs, and between its layers
    feature_dropout: float = 0.0  # on the photo's features

    # The optimizer: AdamW, which is Adam where weight_decay is 0.
    epochs: int = 2
    batch_size: int = 128  # captions
    learning_rate: float = 0.001  # at its highest
    warmup: float = 0.0  # share of all steps in which the learning rate rises to that
    decay: str = "constant"  # of DECAYS; cosine falls to 0 over the rest
    weight_decay: float = 0.0  # of matrices; biases and BatchNorm have none
    clip_norm: float = 5.0  # of all gradients together; healthy training stays below
    average_decay: float = 0.0  # of the moving average of the weights; 0: the last weights

    # The objective.
    label_smoothing: float = 0.0
    scheduled_sampling: float = 0.0  # share of input words, at the end, that the model chose itself
    random_views: bool = True  # each caption sees any view of its photo; else the full one

    # Self-critical training, after the epochs above: CIDEr-D of drawn captions as the reward.
    self_critical_epochs: int = 0
    self_critical_rate: float = 5e-5  # learning rate, level
    self_critical_anchor: float = (
        0.1  # weight of the true captions' cross-entropy beside the reward
    )
    self_critical_photos: int = 32  # a step
    self_critical_samples: int = 5  # captions drawn for each photo

    @property
    def all_epochs(self) -> int:
        return self.epochs + self.self_critical_epochs


# What the learning rate does after its warm-up.
DECAYS = ("constant", "cosine")

# The CNN-LSTM tutorials' training, as thousands have run it.
CLASSIC = Recipe()

# What one vector a photo can give; `scripts/ablation.py` shows what each part brings.
BEST = Recipe(
    embedding_size=512,
    tie_embeddings=True,
    photo_every_step=True,
    dropout=0.5,
    feature_dropout=0.3,
    epochs=20,
    learning_rate=0.002,  # level: the averaged weights settle without it falling
    weight_decay=0.05,
    average_decay=0.999,
    label_smoothing=0.1,
)

RECIPES = {"best": BEST, "classic": CLASSIC}


# A GPU may do a thousand steps in the time that saving takes.
SAVE_EVERY, SAVE_PAUSE_S = 1000, 10.0


# CIDEr of the greedy captions of the validation photos, CIDEr of what beam search says of them, or
# the validation loss.
SELECT_BY = ("cider", "beam", "loss")


@dataclass(frozen=True)
class TrainConfig:
    """What `cap train` does by default, and everything it can be told."""

    from_cache: Path
    out: Path
    recipe: Recipe = BEST
    val_cache: Path | None = None
    val_share: float = 0.05  # of the photos, held out where there is no val_cache
    select_by: str = "cider"  # what makes a model the best one; see SELECT_BY
    patience: int | None = None  # epochs without a better model before stopping; None: never
    min_count: int = 4
    max_length: int = 50  # words of a caption; the rest is cut
    seed: int = 0
    save_every: int | None = (
        None  # steps; None: SAVE_EVERY, and not within SAVE_PAUSE_S of the last
    )
    log_every: int = 10  # steps
    device: str = "auto"
    precision: str = "auto"  # of the products: float32, or bfloat16 where the device is fast at it
    plain: bool = False  # the readable reference instead of the fast path
    resume: bool = False
    overwrite: bool = False


# What a photo is captioned from: its full view, the mean of the views its encoder makes, or
# whichever of them the model was made for.
FULL, MEAN, AUTO = "full", "mean", "auto"


@dataclass(frozen=True)
class SweepConfig:
    """What `cap sweep` does by default, and everything it can be told."""

    from_cache: Path
    out: Path
    val_cache: Path | None = None
    trials: int = 32  # in the folder, those of earlier calls included
    epochs: int = 8  # of each trial: enough to tell them apart
    jobs: int | None = None  # trials at a time; None: one per core (at most 8), one on a GPU
    timeout_s: float | None = None  # after which no further trial starts
    min_count: int = 4
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class SearchConfig:
    """How captions are looked for."""

    beam_size: int = 3  # 1 is greedy search
    max_length: int = 30  # words
    length_penalty: float = 1.0  # 0 prefers short captions, 1 compares the mean per word
    no_repeat_ngram: int = 3  # no so many words in a row twice in a caption; 0: let them
    captions: int = 1  # a photo, best first
    groups: int = 1  # of beams that avoid one another's words
    diversity: float = 0.5  # log-probability that a word of an earlier group costs
    sample: bool = False  # draw words instead of searching
    temperature: float = 1.0  # of drawing: below 1 keeps to likely words
    top_p: float = 1.0  # draw among the likeliest words of this share
    seed: int = 0  # of drawing
    view: str = AUTO


class SearchError(CapError):
    """A search is configured in a way that cannot be. One line."""


def check_search(config: SearchConfig) -> None:
    """Raise SearchError where the settings do not fit one another."""
    if config.beam_size % config.groups:
        raise SearchError(
            f"{config.beam_size} beams cannot be shared by {config.groups} groups equally"
        )
    if config.captions > config.beam_size and not config.sample:
        raise SearchError(
            f"{config.captions} captions of each photo need as many beams, not "
            f"{config.beam_size}; raise --beam-size or draw them with --sample"
        )
    if config.temperature <= 0:
        raise SearchError(f"temperature {config.temperature:g} must be above 0")
    if not 0 < config.top_p <= 1:
        raise SearchError(f"top-p {config.top_p:g} must be above 0 and at most 1")
