"""A training run and its folder: what is logged, what is kept, how to go on after anything.

    runs/base/
      best.cap         the model with the lowest validation loss
      last.cap         the model after the last epoch (or interruption)
      epoch-0-step-1000.cap …   one every `save_every` steps
      metrics.jsonl    one JSON object a log line and an epoch
      checkpoint.pt    decoder, optimizer and position: what `--resume` reads

Every file is written to a temporary name and renamed. A `.cap` file is all that prediction needs.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache.atomic import write_atomically, write_text
from cache.errors import CapError
from cache.record import CacheError
from cache.store import FeatureCache, open_cache
from train.batches import CaptionSet, caption_set, split_photos
from train.bundle import Bundle
from train.config import TrainConfig
from train.decoder import CaptionDecoder, DecoderConfig
from train.device import resolve_device
from train.loop import fit, make_optimizer, validation_loss
from train.vocab import Vocabulary, build_vocabulary

CHECKPOINT_VERSION = 1


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
    loss: float  # mean cross-entropy per target token
    captions_per_s: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def line(self) -> str:
        return (
            f"Epoch [{self.epoch}/{self.epochs}], Step [{self.step}/{self.steps}], "
            f"Loss: {self.loss:.4f}, Perplexity: {self.perplexity:.2f}, "
            f"{self.captions_per_s:,.0f} captions/s"
        )


@dataclass(frozen=True)
class EpochLog:
    """After each epoch."""

    epoch: int
    epochs: int
    val_loss: float
    best_val_loss: float  # of all epochs so far
    seconds: float

    def line(self) -> str:
        best = " (best so far)" if self.val_loss == self.best_val_loss else ""
        return (
            f"Epoch [{self.epoch}/{self.epochs}] done in {self.seconds:.1f} s, "
            f"Validation loss: {self.val_loss:.4f}, "
            f"Perplexity: {math.exp(min(self.val_loss, 700.0)):.2f}{best}"
        )


@dataclass(frozen=True)
class Saved:
    path: Path


Report = Started | StepLog | EpochLog | Saved | None


def train(config: TrainConfig) -> Generator[Report, None, None]:
    """Train as configured. Yields a report, or None, after every step.

    Closing the generator between two steps saves the run, so that `resume` goes on there.
    Raises CacheError, TrainError, VocabularyError or TrainingSetError.
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


class _Run:
    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.out = config.out
        self.device = resolve_device(config.device)
        cache = open_cache(config.from_cache)
        self.cache = cache
        self.vocabulary = build_vocabulary(cache.captions, config.min_count)
        self.training, self.validation = _caption_sets(config, cache, self.vocabulary, self.device)
        torch.manual_seed(config.fit.seed)
        self.decoder = CaptionDecoder(
            DecoderConfig(
                feature_dim=cache.encoder.feature_dim,
                vocab_size=len(self.vocabulary),
                embedding_size=config.embedding_size,
                hidden_size=config.hidden_size,
                num_layers=config.num_layers,
                dropout=config.dropout,
            )
        ).to(self.device)
        self.optimizer = make_optimizer(self.decoder, config.fit)
        self.epoch, self.step = 0, 0  # the next to do
        self.best_val_loss = math.inf
        self._prepare_folder()
        self.metrics = (self.out / "metrics.jsonl").open("a", encoding="utf-8")

    def epochs(self) -> Generator[Report, None, None]:
        config = self.config
        while self.epoch < config.fit.epochs:
            started = time.perf_counter()
            yield from self._steps()
            val_loss = validation_loss(self.decoder, self.validation)
            best = val_loss < self.best_val_loss
            self.best_val_loss = min(val_loss, self.best_val_loss)
            log = EpochLog(
                self.epoch,
                config.fit.epochs,
                val_loss,
                self.best_val_loss,
                time.perf_counter() - started,
            )
            self._write_metrics({"epoch": self.epoch, "val_loss": val_loss, "best": best})
            if best:
                self._save_model("best.cap", val_loss)
            self._save_model("last.cap", val_loss)
            self.epoch, self.step = self.epoch + 1, 0
            self._save_checkpoint()
            yield log
        self.metrics.close()

    def _steps(self) -> Generator[Report, None, None]:
        config = self.config
        losses: list[Tensor] = []
        captions, since = 0, time.perf_counter()
        for report in fit(
            self.decoder,
            self.optimizer,
            self.training,
            config.fit,
            epoch=self.epoch,
            first_step=self.step,
        ):
            losses.append(report.loss)
            captions += report.captions
            self.step = report.step + 1
            if self.step % config.log_every == 0 or self.step == report.steps:
                loss = float(torch.stack(losses).mean())
                if not math.isfinite(loss):
                    raise TrainError(
                        f"{self.out}: the loss is {loss} at epoch {self.epoch}, step {self.step}; "
                        "lower --learning-rate (the last checkpoint is kept)"
                    )
                seconds = time.perf_counter() - since
                log = StepLog(
                    self.epoch,
                    config.fit.epochs,
                    self.step,
                    report.steps,
                    loss,
                    captions / seconds,
                )
                self._write_metrics({"epoch": self.epoch, "step": self.step, "loss": loss})
                losses.clear()
                captions, since = 0, time.perf_counter()
                yield log
            else:
                yield None
            if self.step % config.save_every == 0:
                name = f"epoch-{self.epoch}-step-{self.step}.cap"
                self._save_model(name, None)
                self._save_checkpoint()
                yield Saved(self.out / name)

    def save_position(self) -> None:
        """Keep everything at a step boundary, after an interruption."""
        self._save_model("last.cap", None)
        self._save_checkpoint()
        self.metrics.close()

    def _save_model(self, name: str, val_loss: float | None) -> None:
        facts = {
            "epoch": self.epoch,
            "step": self.step,
            "val_loss": val_loss,
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
            "decoder": self.decoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "best_val_loss": self.best_val_loss,
        }
        write_atomically(self.out / "checkpoint.pt", lambda temporary: torch.save(state, temporary))

    def _write_metrics(self, record: dict[str, Any]) -> None:
        self.metrics.write(json.dumps(record) + "\n")
        self.metrics.flush()

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
            # More epochs are welcome: nothing in an epoch depends on how many follow.
            if name != "epochs" and asked.get(name) != value:
                raise TrainError(
                    f"{self.out}: was trained with {name} {value}, asked for {asked.get(name)}"
                )
        for name, value in self._data_identity().items():
            if state["data"][name] != value:
                raise TrainError(
                    f"{self.out}: was trained on other {name} than {self.config.from_cache} holds"
                )
        self.decoder.load_state_dict(state["decoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.best_val_loss = state["best_val_loss"]
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


def _settings(config: TrainConfig) -> dict[str, int | float]:
    """What must not change when a run is resumed, and what a model records about its making."""
    names = (
        "val_share",
        "embedding_size",
        "hidden_size",
        "num_layers",
        "dropout",
        "min_count",
        "max_length",
    )
    return {name: getattr(config, name) for name in names} | asdict(config.fit)


def _caption_sets(
    config: TrainConfig, cache: FeatureCache, vocabulary: Vocabulary, device: torch.device
) -> tuple[CaptionSet, CaptionSet]:
    """(training, validation) captions; validation from its own cache, or photos held out."""
    if config.val_cache is not None:
        other = open_cache(config.val_cache)
        difference = other.encoder.difference(cache.encoder)
        if difference is not None:
            raise CacheError(f"{config.val_cache}: made with {difference} as {config.from_cache}")
        return (
            caption_set(cache, vocabulary, device=device, max_length=config.max_length),
            caption_set(other, vocabulary, device=device, max_length=config.max_length),
        )
    rows, held_out = split_photos(cache, held_out=config.val_share, seed=config.fit.seed)
    if len(rows) == 1 and not len(held_out):
        raise TrainError(
            f"{config.from_cache}: one photo with captions; too few to hold one out, "
            "use --val-cache"
        )
    return (
        caption_set(cache, vocabulary, rows=rows, device=device, max_length=config.max_length),
        caption_set(cache, vocabulary, rows=held_out, device=device, max_length=config.max_length),
    )
