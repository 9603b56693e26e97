"""A training run and its folder: what is logged, what is kept, how to go on after anything.

    runs/base/
      best.cap         the model with the best validation score
      last.cap         the model after the last epoch (or interruption)
      epoch-0-step-1000.cap …   one every `save_every` steps; if not asked for, not too often
      metrics.jsonl    one JSON object a log line and an epoch
      checkpoint.pt    decoder, optimizer and position: what `--resume` reads

Every file is written to a temporary name and renamed. A `.cap` file is all that prediction needs.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache.atomic import WriteError, write_atomically, write_text
from cache.errors import CapError
from cache.record import CacheError
from cache.store import FeatureCache, open_cache
from train.captions.caption_set import CaptionSet, caption_set
from train.captions.photo_split import split_photos
from train.captions.vocabulary import Vocabulary, build_vocabulary
from train.config import SAVE_EVERY, SAVE_PAUSE_S, Recipe, SearchConfig, TrainConfig
from train.device import is_out_of_memory, resolve_device
from train.fit.best_epoch import Choice, Judged
from train.fit.trainer import Step, Trainer
from train.fit.validation import Validation, ValidationScores
from train.model.bundle import Bundle
from train.model.decoder import CaptionDecoder, DecoderConfig

CHECKPOINT_VERSION = 3


class TrainError(CapError):
    """A run cannot start or go on. One line."""


@dataclass(frozen=True)
class Started:
    """What the run is about to do."""

    captions: int
    photos: int
    val_captions: int
    vocab_size: int
    parameters: int
    epoch: int
    step: int

    def summary(self) -> str:
        begin = f"from epoch {self.epoch}, step {self.step}: " if self.epoch or self.step else ""
        return (
            f"{begin}{self.captions:,} captions of {self.photos:,} photos, "
            f"{self.val_captions:,} to validate, vocabulary {self.vocab_size:,}, "
            f"{self.parameters:,} parameters"
        )


@dataclass(frozen=True)
class StepLog:
    """Every `log_every` steps: the mean loss since the last one. Epoch and step as users count."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float  # mean cross-entropy per target token, or minus the mean reward
    captions_per_s: float
    rewarded: bool = False  # self-critical: the reward is CIDEr-D, 0 to 10

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def line(self) -> str:
        measured = (
            f"Reward: {-self.loss:.4f}"
            if self.rewarded
            else f"Loss: {self.loss:.4f}, Perplexity: {self.perplexity:.2f}"
        )
        return (
            f"Epoch [{self.epoch}/{self.epochs}], Step [{self.step}/{self.steps}], "
            f"{measured}, {self.captions_per_s:,.0f} captions/s"
        )


@dataclass(frozen=True)
class EpochLog:
    """After each epoch. Scores are fractions, of the validation photos' greedy captions, or of
    beam search's where these choose the best model.
    """

    epoch: int
    epochs: int
    val_loss: float
    bleu_4: float
    cider: float
    distinct: float  # share of the photos with a caption of their own
    best: bool  # so far
    seconds: float

    def line(self) -> str:
        return (
            f"Epoch [{self.epoch}/{self.epochs}] done in {self.seconds:.1f} s, "
            f"Validation loss: {self.val_loss:.4f}, "
            f"Perplexity: {math.exp(min(self.val_loss, 700.0)):.2f}, "
            f"BLEU-4: {100 * self.bleu_4:.2f}, CIDEr: {100 * self.cider:.2f}, "
            f"{self.distinct:.0%} distinct{' (best so far)' if self.best else ''}"
        )


@dataclass(frozen=True)
class Saved:
    path: Path


Report = Started | StepLog | EpochLog | Saved | None


def train(config: TrainConfig) -> Generator[Report, None, None]:
    """Train as configured. Yields a report, or None, after every step.

    Closing the generator between two steps saves the run, so that `resume` goes on there.
    Raises CacheError, TrainError, VocabularyError, TrainingSetError or WriteError.
    """
    run = _Run(config)
    try:
        yield Started(
            captions=len(run.training),
            photos=len(set(run.training.feature_rows.tolist())),
            val_captions=len(run.validation),
            vocab_size=len(run.vocabulary),
            parameters=sum(p.numel() for p in run.decoder.parameters()),
            epoch=run.epoch,
            step=run.step,
        )
        yield from run.epochs()
    except GeneratorExit:
        run.save_position()
        raise


@dataclass(frozen=True)
class _Window:
    """The steps of a log line, whose loss is still on the device."""

    step: int  # the last of them
    steps: int
    loss: Tensor
    captions: int


def _reads_losses_late(device: torch.device) -> bool:
    """On a GPU a loss is read when the step after it is queued, which it then does meanwhile."""
    return device.type == "cuda"


class _Run:
    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.out = config.out
        self.device = resolve_device(config.device)
        if self.device.index is not None:
            torch.cuda.set_device(self.device)  # seeds and graphs are the current device's
        cache = open_cache(config.from_cache)
        self.cache = cache
        self.vocabulary = build_vocabulary(cache.captions, config.min_count)
        self.training, self.validation, self.judge = _data(
            config, cache, self.vocabulary, self.device
        )
        torch.manual_seed(config.seed)
        recipe = config.recipe
        self.decoder = CaptionDecoder(
            DecoderConfig(
                feature_dim=cache.encoder.feature_dim,
                vocab_size=len(self.vocabulary),
                embedding_size=recipe.embedding_size,
                hidden_size=recipe.hidden_size,
                num_layers=recipe.num_layers,
                dropout=recipe.dropout,
                feature_dropout=recipe.feature_dropout,
                tie_embeddings=recipe.tie_embeddings,
                photo_every_step=recipe.photo_every_step,
            )
        ).to(self.device)
        self.trainer = Trainer(
            self.decoder,
            self.training,
            recipe,
            seed=config.seed,
            vocabulary=self.vocabulary,
            precision=config.precision,
            plain=config.plain,
        )
        self.epoch, self.step = 0, 0  # the next to do
        self.choice = Choice(by_loss=config.select_by == "loss")
        self._judges_anew = False  # by another measure or other photos than the epochs before
        self._saved_at = time.monotonic()
        self._since = time.perf_counter()  # the last log line
        self._unread: _Window | None = None
        self._prepare_folder()
        path = self.out / "metrics.jsonl"
        try:
            self.metrics = path.open("a", encoding="utf-8")
        except OSError as error:
            raise WriteError(f"{path}: cannot write ({error.strerror})") from None

    def epochs(self) -> Generator[Report, None, None]:
        config = self.config
        if self._judges_anew:
            with self.trainer.best_weights():
                self._keep_if_best(self.epoch if self.step else self.epoch - 1)
        while self.epoch < config.recipe.all_epochs and not self._out_of_patience():
            started = time.perf_counter()
            yield from self._steps()
            with self.trainer.best_weights():
                val_loss, scores, best = self._keep_if_best(self.epoch)
                self._save_model("last.cap", val_loss, scores)
            log = EpochLog(
                epoch=self.epoch,
                epochs=config.recipe.all_epochs,
                val_loss=val_loss,
                bleu_4=scores.bleu_4,
                cider=scores.cider,
                distinct=scores.distinct / scores.count,
                best=best,
                seconds=time.perf_counter() - started,
            )
            self._write_metrics(
                {
                    "epoch": self.epoch,
                    "val_loss": val_loss,
                    "bleu_4": scores.bleu_4,
                    "cider": scores.cider,
                    "distinct": scores.distinct,
                    "best": best,
                }
            )
            self.epoch, self.step = self.epoch + 1, 0
            self._save_checkpoint()
            yield log
        self.metrics.close()

    def _keep_if_best(self, epoch: int) -> tuple[float, ValidationScores, bool]:
        """Judge the decoder as it is: (validation loss, scores, whether it is the best so far)."""
        by_beam = self.config.select_by == "beam"
        val_loss = self._finite(self.trainer.validation_loss(self.validation), self.step)
        search = SearchConfig() if by_beam else SearchConfig(beam_size=1)
        scores = self.judge.score(self.decoder, self.vocabulary, search)
        rewarded = epoch >= self.config.recipe.epochs
        best = self.choice.takes(Judged(epoch, val_loss, scores.ciders, rewarded))
        if best:
            self._save_model("best.cap", val_loss, scores, epoch)
        return val_loss, scores, best

    def _out_of_patience(self) -> bool:
        patience, best = self.config.patience, self.choice.best
        since = self.epoch - 1 - (best.epoch if best else -1)
        return patience is not None and since >= patience

    def _steps(self) -> Generator[Report, None, None]:
        log_every, late = self.config.log_every, _reads_losses_late(self.device)
        losses: list[Tensor] = []
        captions, self._since = 0, time.perf_counter()
        for report in self._trained():
            losses.append(report.loss)
            captions += report.captions
            self.step = report.step + 1
            if self._unread is not None:
                unread, self._unread = self._unread, None
                yield self._log(unread)
            saves, last = self._is_time_to_save(), self.step == report.steps
            if self.step % log_every == 0 or last or saves:
                window = _Window(self.step, report.steps, torch.stack(losses).mean(), captions)
                losses.clear()
                captions = 0
                if late and not (last or saves):
                    self._unread = window
                    yield None
                else:
                    yield self._log(window)
            else:
                yield None
            if saves:
                name = f"epoch-{self.epoch}-step-{self.step}.cap"
                with self.trainer.best_weights():
                    self._save_model(name)
                self._save_checkpoint()
                yield Saved(self.out / name)

    def _log(self, window: _Window) -> StepLog:
        """Waits for the device. Raises TrainError where the loss is not finite."""
        recipe, loss = self.config.recipe, self._finite(float(window.loss), window.step)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._write_metrics({"epoch": self.epoch, "step": window.step, "loss": loss})
        return StepLog(
            self.epoch,
            recipe.all_epochs,
            window.step,
            window.steps,
            loss,
            window.captions / seconds,
            rewarded=self.epoch >= recipe.epochs,
        )

    def _is_time_to_save(self) -> bool:
        every = self.config.save_every
        if every is not None:
            return self.step % every == 0
        due = time.monotonic() - self._saved_at >= SAVE_PAUSE_S
        return due and self.step % SAVE_EVERY == 0

    def _trained(self) -> Iterator[Step]:
        try:
            yield from self.trainer.epoch(self.epoch, self.step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            size = self.config.recipe.batch_size
            raise TrainError(
                f"{self.device}: out of memory with batches of {size} captions; "
                f"try --batch-size {max(1, size // 2)}"
            ) from None

    def _finite(self, loss: float, step: int) -> float:
        if math.isfinite(loss):
            return loss
        raise TrainError(
            f"{self.out}: the loss is {loss} at epoch {self.epoch}, step {step}; "
            "lower --learning-rate (the last checkpoint is kept)"
        )

    def save_position(self) -> None:
        """Keep everything at a step boundary, after an interruption."""
        if self._unread is not None:
            self._log(self._unread)
        with self.trainer.best_weights():
            self._save_model("last.cap")
        self._save_checkpoint()
        self.metrics.close()

    def _save_model(
        self,
        name: str,
        val_loss: float | None = None,
        scores: ValidationScores | None = None,
        epoch: int | None = None,
    ) -> None:
        facts = {
            "epoch": self.epoch if epoch is None else epoch,
            "step": self.step,
            "val_loss": val_loss,
            "scores": scores.as_dict() if scores else None,
            "captions": len(self.training),
            "config": _settings(self.config),
        }
        Bundle(self.decoder, self.vocabulary, self.cache.encoder, facts).save(self.out / name)

    def _save_checkpoint(self) -> None:
        self.metrics.flush()
        state = {
            "version": CHECKPOINT_VERSION,
            "settings": _settings(self.config),
            "data": self._data_identity(),
            "trainer": self.trainer.state(),
            "epoch": self.epoch,
            "step": self.step,
            "choice": self.choice.state(),
            "validated_on": self.judge.identity,
        }

        def write(temporary: Path) -> None:
            try:
                with temporary.open("wb") as file:
                    torch.save(state, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # what the disk said; torch covers it up
                    raise error.__context__ from None
                raise

        write_atomically(self.out / "checkpoint.pt", write)
        self._saved_at = time.monotonic()

    def _write_metrics(self, record: dict[str, Any]) -> None:
        try:
            self.metrics.write(json.dumps(record) + "\n")
            self.metrics.flush()
        except OSError as error:
            raise WriteError(f"{self.metrics.name}: cannot write ({error.strerror})") from None

    def _data_identity(self) -> dict[str, str]:
        cache = self.cache
        return {
            "photos": cache.photos_sha256,
            "captions": cache.captions_sha256,
            "weights": cache.encoder.weights_sha256,
        }

    def _prepare_folder(self) -> None:
        config, checkpoint = self.config, self.out / "checkpoint.pt"
        if config.resume:
            if not checkpoint.exists():
                raise TrainError(f"{self.out}: nothing to resume (no checkpoint.pt)")
            self._restore(checkpoint)
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainError(f"{self.out}: cannot make the folder ({error.strerror})") from None
        kept = [*self.out.glob("*.cap"), *self.out.glob("checkpoint.pt")]
        if kept and not config.overwrite:
            raise TrainError(
                f"{self.out}: holds a run already; go on with --resume, start anew with "
                "--overwrite, or name another --out"
            )
        for path in [*kept, self.out / "metrics.jsonl"]:
            path.unlink(missing_ok=True)

    def _restore(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            version = state["version"]
        except Exception as error:  # torch.load raises a dozen kinds on a damaged file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TrainError(f"{path}: cannot read ({reason[:120]})") from None
        if version != CHECKPOINT_VERSION:
            raise TrainError(f"{path}: format {version}, this program reads {CHECKPOINT_VERSION}")
        asked = _settings(self.config)
        for name, value in state["settings"].items():
            # More epochs are welcome where nothing in an epoch depends on how many follow, and
            # self-critical ones whenever none has begun.
            begun = (state["epoch"], state["step"]) > (state["settings"]["epochs"], 0)
            if name == "epochs" and _may_grow(self.config.recipe) and not begun:
                continue
            if name.startswith("self_critical") and not begun:
                continue
            if name == "select_by" and asked[name] != value:
                self._judges_anew = True
                continue
            if asked.get(name) != value:
                raise TrainError(
                    f"{self.out}: was trained with {name} {value}, asked for {asked.get(name)}; "
                    "give the options it was begun with, or another --out"
                )
        for name, value in self._data_identity().items():
            if state["data"][name] != value:
                raise TrainError(
                    f"{self.out}: was trained on other {name} than {self.config.from_cache} holds"
                )
        self.trainer.load(state["trainer"])
        self.epoch, self.step = state["epoch"], state["step"]
        self._judges_anew |= state["validated_on"] != self.judge.identity
        if not self._judges_anew:
            self.choice.load(state["choice"])
        self._drop_later_metrics()

    def _drop_later_metrics(self) -> None:
        """Forget log lines of steps that will be done again."""
        path = self.out / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                position = (record["epoch"], record.get("step", math.inf))
            except (ValueError, KeyError):
                continue  # half a line, from a kill
            if position <= (self.epoch, self.step):
                kept.append(line + "\n")
        write_text(path, "".join(kept))


def _settings(config: TrainConfig) -> dict[str, int | float | str | bool]:
    """What must not change when a run is resumed, and what a model records about its making."""
    names = ("val_share", "min_count", "max_length", "seed", "select_by", "precision", "plain")
    return {name: getattr(config, name) for name in names} | asdict(config.recipe)


def _may_grow(recipe: Recipe) -> bool:
    return recipe.decay == "constant" and not recipe.warmup and not recipe.scheduled_sampling


def _data(
    config: TrainConfig, cache: FeatureCache, vocabulary: Vocabulary, device: torch.device
) -> tuple[CaptionSet, CaptionSet, Validation]:
    """(training captions, validation captions, the latter's photos and references).

    Validation has its own cache, or photos held out.
    """
    if config.val_cache is not None:
        other = open_cache(config.val_cache)
        difference = other.encoder.difference(cache.encoder)
        if difference is not None:
            raise CacheError(f"{config.val_cache}: made with {difference} as {config.from_cache}")
        rows = held_out = None
    else:
        other = cache
        rows, held_out = split_photos(cache, held_out=config.val_share, seed=config.seed)
        if len(rows) == 1 and not len(held_out):
            raise TrainError(
                f"{config.from_cache}: one photo with captions; too few to hold one out, "
                "use --val-cache"
            )
    length = config.max_length
    try:
        training = caption_set(cache, vocabulary, rows=rows, device=device, max_length=length)
        validation = caption_set(
            other,
            vocabulary,
            rows=held_out,
            device=device,
            max_length=length,
            shared=training if other is cache else None,
        )
    except torch.OutOfMemoryError:
        size = cache.features.nbytes + (0 if other is cache else other.features.nbytes)
        raise TrainError(
            f"{device}: no memory for {size / 1e9:.1f} GB of features; use --device cpu"
        ) from None
    return training, validation, Validation(other, rows=held_out)
