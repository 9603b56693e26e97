"""What training and a sweep report while they run, and the lines that the user sees of it.

Epochs count from 0 in the reports, as in the files of a run, and from 1 in the lines.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.captions.vocabulary import SPECIALS


@dataclass(frozen=True)
class Started:
    """What the run is about to do."""

    captions: int
    photos: int
    val_captions: int
    vocab_size: int
    parameters: int
    epoch: int  # the first epoch and step to train; not 0 in a resumed run
    step: int
    copies: int = 0  # photos that are copies of others, all of them on one side of the split
    val_photos: int = 0
    val_photos_trained_on: int = 0  # of `val_photos`, copies of training photos
    by_loss: bool = False  # whether the loss is to choose the best model
    min_count: int = 1  # of a word in the vocabulary
    batch_size: int = 128
    epochs: int = 0  # by cross-entropy, at most
    epoch_steps: int = 0
    patience_steps: int | None = None  # steps without a better model after which training ends
    processes: int = 1  # that train together
    window: str = ""  # how features are streamed that do not fit into memory, in one line

    def summary(self) -> str:
        """Two lines, and one for each thing to know about processes, features that are streamed,
        and equal photos.
        """
        lines = [self._sizes(), self._length() + self._choice(), *self.notices()]
        if self.processes > 1:
            shares = "each on its share of the captions of every step"
            lines.insert(2, f"{self.processes} processes, {shares}")
        return "\n".join(lines)

    def notices(self) -> list[str]:
        """A line if features are streamed, and one for each thing to know about equal photos."""
        lines = [self.window] if self.window else []
        if self.copies:
            lines.append(
                f"{self.copies:,} photos are copies of others; a photo and its copies are either "
                "all trained on or all held out"
            )
        if self.val_photos_trained_on:
            lines.append(
                f"{self.val_photos_trained_on:,} of {self.val_photos:,} validation photos are also "
                "trained on, so the validation scores are too good"
            )
        return lines

    def _sizes(self) -> str:
        resumed = ""
        if self.epoch or self.step:
            resumed = f"from epoch {self.epoch + 1}, step {self.step}: "
        words = _counted(self.vocab_size - len(SPECIALS), "word")
        return (
            f"{resumed}{self.captions:,} captions of {_counted(self.photos, 'photo')} to train on, "
            f"{self.val_captions:,} captions of {_counted(self.val_photos, 'photo')} held out for "
            f"validation, vocabulary of {words} ({_at_least(self.min_count)}), "
            f"{self.parameters:,} parameters"
        )

    def _choice(self) -> str:
        from train.fit.best_epoch import FEWEST_PHOTOS  # which imports torch

        if self.by_loss or self.val_photos >= FEWEST_PHOTOS:
            return ""
        photos = _counted(self.val_photos, "validation photo")
        return f"; with {photos} the loss chooses the best one"

    def _length(self) -> str:
        epochs = _counted(self.epochs, "epoch")
        steps = f"{_counted(self.epoch_steps, 'step')} of {_counted(self.batch_size, 'caption')}"
        if self.patience_steps is None:
            return f"{epochs} of {steps}"
        return (
            f"at most {epochs} of {steps}, until {self.patience_steps:,} steps have brought no "
            "better model"
        )


@dataclass(frozen=True)
class StepLog:
    """The mean loss and the speed since the last log line.

    One is made every `log_every` steps, or by time, and at the end of an epoch. The epoch counts
    from 0, the step from 1.
    """

    epoch: int
    epochs: int
    step: int
    steps: int  # in the epoch
    loss: float  # mean cross-entropy per target token, smoothed or not, or minus the mean reward
    captions_per_s: float
    rewarded: bool = False  # self-critical: the reward is CIDEr-D, 0 to 10
    smoothed: bool = False  # the loss is against smoothed targets
    learning_rate: float = 0.0  # of the last of these steps
    steps_per_s: float = 0.0
    all_steps: int = 0  # trained since the start of training, this one included
    # At most, until the last epoch of this kind is done; None before an epoch has been validated.
    seconds_left: float | None = None

    @property
    def objective(self) -> str:
        """What the loss is: cross-entropy, smoothed (the same against smoothed targets), reward."""
        if self.rewarded:
            return "reward"
        return "smoothed" if self.smoothed else "cross-entropy"

    @property
    def perplexity(self) -> float | None:
        """None if the loss is not the cross-entropy of the true words, of which it is made."""
        return None if self.rewarded or self.smoothed else perplexity_of(self.loss)

    def measure(self) -> str:
        """The loss, under the name of what it is."""
        if self.rewarded:
            return f"Reward: {-self.loss:.4f}"
        if self.smoothed:
            return f"Smoothed loss: {self.loss:.4f}"
        return f"Loss: {self.loss:.4f}, Perplexity: {perplexity_of(self.loss):.2f}"

    def line(self) -> str:
        left = f", at most {duration(self.seconds_left)} left" if self.seconds_left else ""
        return (
            f"Epoch [{self.epoch + 1}/{self.epochs}], Step [{self.step}/{self.steps}], "
            f"{self.measure()}, {per_second(self.steps_per_s)} steps/s, "
            f"{self.captions_per_s:,.0f} captions/s{left}"
        )


@dataclass(frozen=True)
class EpochLog:
    """The validation scores after an epoch, as fractions.

    They are scores of greedy captions, or of beam search's captions where those choose the best
    model.
    """

    epoch: int
    epochs: int
    val_loss: float
    bleu_4: float
    cider: float
    distinct: float  # number of different captions, divided by the number of photos
    best: bool  # this epoch's model is the best one so far
    seconds: float
    steps: int | None = None  # since the start of training; None in self-critical epochs
    seconds_left: float = 0.0  # at most, until the last epoch of this kind is done
    photos: int = 0  # that were validated on
    all_steps: int = 0  # since the start of training, self-critical ones included

    @property
    def perplexity(self) -> float:
        """Of the validation captions."""
        return perplexity_of(self.val_loss)

    def line(self) -> str:
        done = f"{self.steps:,} steps, " if self.steps is not None else ""
        left = f", at most {duration(self.seconds_left)} left" if self.seconds_left else ""
        return (
            f"Epoch [{self.epoch + 1}/{self.epochs}] done in {self.seconds:.1f} s, {done}"
            f"Validation loss: {self.val_loss:.4f}, "
            f"Perplexity: {self.perplexity:.2f}, "
            f"BLEU-4: {100 * self.bleu_4:.2f}, CIDEr: {100 * self.cider:.2f}, "
            f"{self.distinct:.0%} distinct{' (best so far)' if self.best else ''}{left}"
        )


@dataclass(frozen=True)
class StartScores:
    """The validation scores of the model that training starts from, as fractions."""

    val_loss: float
    bleu_4: float
    cider: float

    def line(self) -> str:
        return (
            f"Before training: Validation loss: {self.val_loss:.4f}, "
            f"Perplexity: {perplexity_of(self.val_loss):.2f}, "
            f"BLEU-4: {100 * self.bleu_4:.2f}, CIDEr: {100 * self.cider:.2f}"
        )


@dataclass(frozen=True)
class OutOfPatience:
    """Epochs are left out, because none of the last ones has brought a better model."""

    epoch: int  # the first one left out, from 0
    epochs: int  # of this kind, as planned
    self_critical_follow: bool
    steps: int | None = None  # that have brought no better model; None: --patience is over

    def line(self) -> str:
        then = "; self-critical epochs follow" if self.self_critical_follow else ""
        left_out = f"epochs {self.epoch + 1} to {self.epochs} are left out"
        if self.epoch + 1 == self.epochs:
            left_out = f"epoch {self.epochs} is left out"
        if self.steps is None:
            return f"no better model within --patience, so {left_out}{then}"
        return (
            f"no better model in {self.steps:,} steps, so {left_out}{then} "
            "(--epochs N trains N epochs)"
        )


@dataclass(frozen=True)
class Advice:
    """What helps a model that has learned little."""

    captions: int  # that were trained on
    doubt: str | None  # why its captions mean little; None if they are only few

    def line(self) -> str:
        found = (
            f"{self.captions:,} captions are few to learn from"
            if self.doubt is None
            else f"the captions of the best model mean little ({self.doubt})"
        )
        return (
            f"{found}: more photos, more captions of each, --views full,flip or a stronger "
            "--backbone help, and --from-model goes on from a trained model"
        )


@dataclass(frozen=True)
class Saved:
    """A model was written in the middle of an epoch."""

    path: Path


TrainReport = Started | StartScores | StepLog | EpochLog | Saved | OutOfPatience | Advice


@dataclass(frozen=True)
class SweepNotice:
    """What to know about the photos of all trials."""

    text: str

    def line(self) -> str:
        return self.text


@dataclass(frozen=True)
class TrialLog:
    """A trial of a sweep that has ended."""

    number: int
    folder: Path
    # complete, stopped (for its low scores), failed, or lost (its process died, and a new trial
    # has its settings)
    state: str
    cider: float | None  # of its best.cap, on the validation photos
    epochs: int  # trained
    seconds: float
    settings: dict[str, Any]
    best: bool  # so far
    problem: str = ""  # why it failed

    def line(self) -> str:
        settings = " ".join(f"{name}={_short(value)}" for name, value in self.settings.items())
        score = "no score" if self.cider is None else f"CIDEr {100 * self.cider:.2f}"
        best = " (best so far)" if self.best else ""
        ending = {
            "complete": "",
            "stopped": ", stopped early",
            "failed": f", {self.problem}",
            "lost": f", {self.problem}; tried once more",
        }
        return (
            f"trial {self.number}: {score}{best}{ending[self.state]}, {self.epochs} epochs "
            f"in {self.seconds:.1f} s: {settings}"
        )


@dataclass(frozen=True)
class SweepResult:
    """The best trial of a sweep, and the number of trials."""

    folder: Path
    cider: float  # of its best.cap
    settings: dict[str, Any]  # all that `cap train` needs, but for `out`, to train this model again
    trials: int
    threads: int | None = None  # of PyTorch on a CPU, which the last bits of the weights depend on

    def options(self) -> str:
        """The settings as options of `cap train`."""
        return " ".join(
            f"--{name.replace('_', '-')} {shlex.quote(str(value))}"  # str of a float is exact
            for name, value in self.settings.items()
        )

    def as_dict(self) -> dict[str, Any]:
        settings = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in self.settings.items()
        }
        return {**asdict(self), "folder": str(self.folder), "settings": settings}


def perplexity_of(loss: float) -> float:
    """Of a mean cross-entropy per word."""
    return math.exp(min(loss, 700.0))  # beyond 700 the exponential overflows


def _at_least(count: int) -> str:
    return "every word" if count == 1 else f"words that occur {count} times or more"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def per_second(rate: float) -> str:
    """`0.04`, `1.8`, `92`, `1,950`: with as many digits as tell something."""
    if rate < 1:
        return f"{rate:.2g}"
    return f"{rate:.1f}" if rate < 10 else f"{rate:,.0f}"


def duration(seconds: float) -> str:
    """`7 s`, `3 min 20 s`, `12 min`, `2 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
