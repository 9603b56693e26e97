"""Every default of training and decoding. Imports nothing heavy, since `--help` shows them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict

from cache.errors import CapError
from train.option import SettingError, about, check_bounds, option

# PyTorch's generators take seeds of 64 bits.
MAX_SEED = 2**64 - 1

# What the learning rate does after its warm-up.
DECAYS = ("constant", "cosine")

MIN_COUNT_HELP = "Words that occur less often become <unk>."


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes a model and its training, apart from the data."""

    # None leaves a number to the data: `train/fit/data_recipe.py` chooses it.
    epochs: int | None = option(
        2,
        "Passes over the training captions; by the data: until validation shows that nothing more "
        "is gained.",
        min=1,
    )
    batch_size: int | None = option(128, "Captions per step.", min=1)
    min_count: int | None = option(4, MIN_COUNT_HELP, min=1)

    # The decoder.
    embedding_size: int = option(256, "Size of word embeddings and of the projected photo.", min=1)
    hidden_size: int = option(512, "LSTM hidden size.", min=1)
    num_layers: int = option(1, "LSTM layers.", min=1)
    tie_embeddings: bool = option(False, "Read and write a word with the same vector.")
    photo_every_step: bool = option(
        False, "Show the photo to the LSTM with every word, not only before the first."
    )

    # The optimizer: AdamW, which is Adam where weight_decay is 0.
    learning_rate: float | None = option(
        0.001,
        "Highest learning rate of AdamW; by the data: 0.002, or 0.0005 with --from-model.",
        min=0.0,
    )
    warmup: float = option(
        0.0, "Share of all steps in which the learning rate rises to its highest.", min=0.0, max=1.0
    )
    decay: str = option(
        "constant",
        "Learning rate after the warm-up: constant, or cosine, which falls to 0.",
        choices=DECAYS,
    )
    # Biases and BatchNorm have no weight decay.
    weight_decay: float = option(0.0, "AdamW's weight decay, of matrices only.", min=0.0)
    # Healthy training stays below this.
    clip_norm: float = option(5.0, "Clip the norm of all gradients together to this.", min=1e-6)
    average_decay: float = option(
        0.0,
        "Decay per step of the moving average of the weights; 0 takes the last weights instead.",
        min=0.0,
        max=0.999999,
    )

    # Regularization and the objective.
    dropout: float = option(
        0.0, "Dropout on the LSTM's inputs and outputs and between its layers.", min=0.0, max=0.95
    )
    feature_dropout: float = option(0.0, "Dropout on the photo's features.", min=0.0, max=0.95)
    label_smoothing: float = option(
        0.0, "Share of each target that is spread over all words.", min=0, max=0.9
    )
    random_views: bool = option(
        True, "Train each caption on a random view of its photo, not always on the full one."
    )

    # Self-critical training, after the epochs above: CIDEr-D of drawn captions is the reward.
    self_critical_epochs: int = option(
        0, "Self-critical epochs after the others; they reward drawn captions by CIDEr-D.", min=0
    )
    self_critical_rate: float = option(
        5e-5, "Constant learning rate of self-critical epochs.", min=0.0
    )
    self_critical_anchor: float = option(
        0.1, "Weight of the true captions' cross-entropy beside that reward.", min=0.0
    )
    self_critical_photos: int = option(32, "Photos per self-critical step.", min=1)
    self_critical_samples: int = option(5, "Captions drawn for each of those photos.", min=2)

    def __post_init__(self) -> None:
        """Raises SettingError."""
        check_bounds(self)
        for name in ("rate", "anchor", "photos", "samples"):
            field = f"self_critical_{name}"
            if not self.self_critical_epochs and getattr(self, field) != getattr(Recipe, field):
                raise SettingError(
                    f"--self-critical-{name} has no effect without self-critical epochs; "
                    "add --self-critical-epochs or leave it out"
                )


@dataclass(frozen=True)
class FixedRecipe(Recipe):
    """A recipe that leaves nothing to the data."""

    epochs: int = 2
    batch_size: int = 128
    min_count: int = 4
    learning_rate: float = 0.001
    # Training by cross-entropy ends after this many steps without a better model, and at the
    # latest after `epochs`; None: not before.
    patience_steps: int | None = None

    @property
    def all_epochs(self) -> int:
        return self.epochs + self.self_critical_epochs


# The training of the CNN-LSTM tutorials, as thousands have run it.
CLASSIC = Recipe()

# The best we know for one vector per photo; `scripts/ablation.py` shows what each part brings.
BEST = Recipe(
    embedding_size=512,
    tie_embeddings=True,
    photo_every_step=True,
    dropout=0.5,
    feature_dropout=0.3,
    epochs=None,
    batch_size=None,
    min_count=None,
    learning_rate=None,
    decay="constant",  # the averaged weights settle without a falling rate
    weight_decay=0.05,
    average_decay=0.999,
    label_smoothing=0.1,
)

RECIPES = {"best": BEST, "classic": CLASSIC}


# A GPU may do a thousand steps in the time that saving takes, hence the pause as well.
SAVE_EVERY, SAVE_PAUSE_S = 1000, 10.0


# The CIDEr of greedy captions of the validation photos, the CIDEr of beam search's captions of
# them, or the validation loss.
SELECT_BY = ("cider", "beam", "loss")

# Of the matrix products.
PRECISIONS = ("auto", "float32", "bfloat16")

DEVICE_HELP = "auto, cpu, cuda or cuda:N."
TRAIN_CACHE_HELP = "Cache of the training photos."
VAL_CACHE_HELP = "Cache to validate on; without it, some of the photos are held out."


@dataclass(frozen=True)
class WindowSize:
    """The memory for features that training uses: by itself `auto`, as `parse` reads it."""

    everything: bool = False
    size_bytes: int | None = None
    share: float | None = None  # of all features

    @classmethod
    def parse(cls, text: str) -> WindowSize:
        """`auto`, `all`, a size as in `4GB`, or a share as in `10%`. Raises SettingError."""
        if text in ("auto", "all"):
            return cls(everything=text == "all")
        found = _SIZE.fullmatch(text)
        number = float(found[1]) if found else 0.0
        if not found or not number or (found[2] == "%" and number > 100):
            raise SettingError(
                f"--window {text!r} is neither auto nor all, nor a size as in 4GB, nor a share as "
                "in 10%"
            )
        if found[2] == "%":
            return cls(share=number / 100)
        return cls(size_bytes=int(number * 1000 ** "BkMGT".index((found[2] or "B")[0])))


_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(%|B|kB|MB|GB|TB)?")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of `cap train`."""

    from_cache: Path = field(metadata=about(TRAIN_CACHE_HELP))
    out: Path = field(metadata=about("Run folder to write."))
    val_cache: Path | None = option(None, VAL_CACHE_HELP)
    val_list: Path | None = option(
        None, "Validate on the photos of --from-cache named in this file, one per line."
    )
    recipe: Recipe = option(
        BEST,
        "best, or classic: the training of the CNN-LSTM tutorials. The options that show a value "
        "for each recipe override it.",
        presets=RECIPES,
    )
    from_model: Path | None = option(
        None,
        "A trained model to start from, of the same encoder: its sizes, weights and words. New "
        "words are added.",
    )
    max_length: int = 50  # words of a caption; the rest is cut off, unless many are longer
    val_share: float | None = option(
        None,
        "Share of the photos held out for validation without --val-cache and --val-list; at least "
        "one photo.  [default: by their number]",
        min=0.0,
        max=0.9,
    )
    select_by: str = option(
        "cider",
        "How to choose the best model on the validation photos: cider (CIDEr of greedy captions), "
        "beam (CIDEr of beam search) or loss.",
        choices=SELECT_BY,
    )
    patience: int | None = option(
        None,
        "Stop after this many epochs without a better model; self-critical epochs still follow.  "
        "[default: never]",
        min=1,
    )
    seed: int = option(0, "Seed of everything random.", min=0, max=MAX_SEED)
    save_every: int | None = option(
        None,
        f"Steps between saved models.  [default: {SAVE_EVERY}, "
        f"but not within {SAVE_PAUSE_S:.0f} s of the last; the last three are kept]",
        min=1,
    )
    log_every: int | None = option(
        None, "Steps between log lines.  [default: by time, and at least 10]", min=1
    )
    tensorboard: bool = option(
        False, "Also write the curves for TensorBoard, into the run's folder (needs TensorBoard)."
    )
    window: str = option(
        "auto",
        "Memory for features: auto (all of them if they fit, else a part at a time), all, a size "
        "as in 4GB, or a share of them as in 10%.",
    )
    device: str = option("auto", DEVICE_HELP)
    precision: str = option(
        "auto",
        "Precision of the matrix products: auto (bfloat16 where that is fast), float32 or "
        "bfloat16.",
        choices=PRECISIONS,
    )
    plain: bool = option(
        False, "Use the slow, readable reference computation, except in self-critical epochs."
    )
    resume: bool = option(False, "Continue the run in --out; give its options again.")
    overwrite: bool = option(False, "Start afresh even if --out holds a run.")

    def __post_init__(self) -> None:
        """Raises SettingError."""
        check_bounds(self)
        WindowSize.parse(self.window)
        if self.plain and self.precision == "bfloat16":
            raise SettingError("--plain computes in float32; leave out --precision bfloat16")
        if self.val_cache is not None and self.val_list is not None:
            raise SettingError(
                "--val-cache validates on photos of its own, --val-list on some of --from-cache; "
                "give one of them"
            )
        for name in ("val_cache", "val_list"):
            if getattr(self, name) is not None and self.val_share is not None:
                option_name = f"--{name.replace('_', '-')}"
                raise SettingError(
                    f"--val-share has no effect beside {option_name}; give one of the two"
                )
        if self.resume and self.overwrite:
            raise SettingError(
                "--resume continues the run in --out, --overwrite starts afresh; give one of them"
            )


@dataclass(frozen=True)
class SweepConfig:
    """The settings of `cap sweep`."""

    from_cache: Path = field(metadata=about(TRAIN_CACHE_HELP))
    out: Path = field(metadata=about("Folder of the sweep; each trial is a run folder in it."))
    val_cache: Path | None = option(None, VAL_CACHE_HELP)
    trials: int = option(32, "Trials in the folder, including those of earlier calls.", min=1)
    epochs: int = option(8, "Epochs per trial.", min=1)  # enough to tell trials apart
    jobs: int | None = option(
        None,
        "Trials at a time.  [default: one per core (at most 8), or one on a GPU]",
        min=1,
    )
    timeout_s: float | None = option(
        None, "Start no further trial after this many seconds.", min=0.0
    )
    min_count: int | None = option(
        None, f"{MIN_COUNT_HELP}  [default: by the number of captions]", min=1
    )
    # The sampler of trials takes 32 bits, and the number of trials is added.
    seed: int = option(0, "Seed of everything random.", min=0, max=2**31 - 1)
    device: str = option("auto", DEVICE_HELP)

    def __post_init__(self) -> None:
        """Raises SettingError."""
        check_bounds(self)


# What a photo is captioned from: its full view, the mean of the views its encoder makes, or the
# one of the two that the model's record names. `cap train` names none, which means the full view.
FULL, MEAN, AUTO = "full", "mean", "auto"


# Words of a caption that search ends at, unless the training captions are longer.
LONGEST = 30


@dataclass(frozen=True)
class SearchConfig:
    """How captions are searched for, or drawn."""

    beam_size: int = option(3, "Beams of the search; 1 is greedy search.", min=1)
    max_length: int | None = option(
        None,
        f"Longest caption, in words.  [default: {LONGEST}, or more where those of training are]",
        min=1,
    )
    length_penalty: float = option(
        1.0,
        "0 prefers short captions, 1 compares captions by their mean log-probability per word.",
        min=0.0,
        max=10.0,
    )
    no_repeat_ngram: int = option(
        3, "Never repeat this many words in a row within a caption; 0 allows it.", min=0
    )
    captions: int = 1  # per photo, best first; an option of `cap predict` alone
    groups: int = option(1, "Split the beams into groups that avoid each other's words.", min=1)
    diversity: float = option(
        0.5,
        "Log-probability that a word loses for each beam of an earlier group that chose it.",
        min=0.0,
        max=1000.0,
    )
    sample: bool = option(False, "Draw words at random instead of searching.")
    temperature: float = option(
        1.0, "Temperature of --sample; below 1 favours likely words.", min=1e-4, max=1e4
    )
    top_p: float = option(
        1.0,
        "Let --sample draw from the likeliest words whose probabilities add up to this: above 0, "
        "at most 1.",
    )
    seed: int = option(0, "Seed of --sample.", min=0)
    view: str = option(
        AUTO,
        "Caption from full (the whole photo), mean (the mean of the encoder's views) or auto "
        "(the one that the model's record names, or else full).",
        choices=(AUTO, FULL, MEAN),
    )

    def __post_init__(self) -> None:
        """Raises SettingError."""
        check_bounds(self)

    @property
    def longest(self) -> int:
        """Words of the longest caption."""
        return LONGEST if self.max_length is None else self.max_length

    def up_to(self, words: int) -> SearchConfig:
        """These settings for a model that learned captions of this many words."""
        if self.max_length is not None:
            return self
        return replace(self, max_length=max(LONGEST, words))


# The settings that have no effect: without `sample`, and with it.
_WITHOUT_EFFECT = (("temperature", "top_p", "seed"), ("beam_size", "groups", "diversity"))


class SearchError(CapError):
    """Raised when the settings of a search contradict each other. The message is one line."""


class SearchSettings(TypedDict, total=False):
    """Fields of a SearchConfig by name: the keyword arguments that change some of them."""

    beam_size: int
    max_length: int | None
    length_penalty: float
    no_repeat_ngram: int
    captions: int
    groups: int
    diversity: float
    sample: bool
    temperature: float
    top_p: float
    seed: int
    view: str


def with_enough_beams(config: SearchConfig) -> tuple[SearchConfig, str | None]:
    """(the settings with as many beams as the captions and groups ask for, one line if those are
    more than were asked for).
    """
    beams = max(config.beam_size, config.captions)
    beams = -(-beams // config.groups) * config.groups
    if config.sample or beams == config.beam_size:
        return config, None
    why = f"{config.captions} captions" if config.captions > config.beam_size else ""
    if beams % max(config.beam_size, config.captions):
        why += f"{' in ' if why else ''}{config.groups} groups"
    return replace(config, beam_size=beams), f"searching with {beams} beams, for {why}"


def check_search(config: SearchConfig) -> None:
    """Raise SearchError if the settings contradict each other."""
    if config.beam_size % config.groups:
        raise SearchError(
            f"{config.beam_size} beams cannot be shared by {config.groups} groups equally"
        )
    if config.captions > config.beam_size and not config.sample:
        raise SearchError(
            f"{config.captions} captions of each photo need as many beams, not "
            f"{config.beam_size}; raise --beam-size or draw them with --sample"
        )
    if not 0 < config.top_p <= 1:
        raise SearchError(f"top-p {config.top_p:g} must be above 0 and at most 1")
    for name in _WITHOUT_EFFECT[config.sample]:
        if getattr(config, name) != getattr(SearchConfig, name):
            flag = f"--{name.replace('_', '-')}"
            if config.sample:
                raise SearchError(f"{flag} has no effect on --sample; leave out one of the two")
            raise SearchError(f"{flag} has no effect without --sample; add that or leave this out")
    if config.diversity != SearchConfig.diversity and config.groups == 1:
        raise SearchError("--diversity has no effect on one group; add --groups or leave it out")
