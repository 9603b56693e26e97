"""A training run: data and decoder set up, epochs trained, the best model chosen and saved.

`train` runs or resumes one. Its folder is described in `train.fit.run_folder`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cache.record import CacheError
from cache.store import FeatureCache, open_cache
from train.captions.caption_set import CaptionSet, caption_set
from train.captions.photo_split import split_photos
from train.captions.vocabulary import Vocabulary, build_vocabulary
from train.config import SAVE_EVERY, SAVE_PAUSE_S, SearchConfig, TrainConfig
from train.device import is_out_of_memory, resolve_device
from train.fit.best_epoch import BestEpochTracker, ValidatedEpoch
from train.fit.reports import EpochLog, Saved, Started, StepLog, TrainReport
from train.fit.run_folder import (
    Checkpoint,
    RunFolder,
    TrainError,
    check_resumable,
    data_identity,
    run_settings,
)
from train.fit.trainer import StepResult, Trainer
from train.fit.validation import ValidationPhotos, ValidationScores
from train.model.bundle import Bundle
from train.model.decoder import CaptionDecoder, DecoderConfig


def train(config: TrainConfig) -> Generator[TrainReport | None, None, None]:
    """Train as configured. Yields a report, or None, after every step.

    Closing the generator between two steps saves the run, so that it can be resumed at that step.
    Raises CacheError, TrainError, VocabularyError, TrainingSetError or WriteError.
    """
    run = _Run(config)
    with run.metrics:
        try:
            yield run.started()
            yield from run.epochs()
        except GeneratorExit:
            run.save_position()
            raise


@dataclass(frozen=True)
class _PendingLog:
    """The steps behind a log line, whose loss has not been read from the device yet."""

    step: int  # the last of these steps
    steps: int  # in the epoch
    loss: Tensor
    captions: int


def _reads_losses_late(device: torch.device) -> bool:
    """Whether to read a loss only once the next step is queued.

    Reading waits for the device. On a GPU the host then queues the next step meanwhile.
    """
    return device.type == "cuda"


class _Run:
    """A run between two steps. `epoch` and `step` are those of the next step to train."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        if self.device.index is not None:
            # Seeds and graphs belong to the current device.
            torch.cuda.set_device(self.device)
        cache = open_cache(config.from_cache)
        self.cache = cache
        self.vocabulary = build_vocabulary(cache.captions, config.min_count)
        self.training_captions, self.validation_captions, self.validation_photos = _load_data(
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
            self.training_captions,
            recipe,
            seed=config.seed,
            vocabulary=self.vocabulary,
            precision=config.precision,
            plain=config.plain,
        )
        self.epoch, self.step = 0, 0
        self.best_epoch = BestEpochTracker(by_loss=config.select_by == "loss")
        self._validates_first = False
        self._pending_log: _PendingLog | None = None
        self.folder = RunFolder(config.out)
        if config.resume:
            self._resume(self.folder.read_checkpoint())
        else:
            self.folder.start(overwrite=config.overwrite)
        self.metrics = self.folder.open_metrics()
        self._saved_at = time.monotonic()
        self._logged_at = time.perf_counter()

    def _resume(self, checkpoint: Checkpoint) -> None:
        check_resumable(checkpoint, self.config, data_identity(self.cache))
        self.trainer.load(checkpoint.trainer)
        self.epoch, self.step = checkpoint.epoch, checkpoint.step
        # Scores by another measure or of other photos do not compare with those before.
        self._validates_first = (
            checkpoint.settings["select_by"] != self.config.select_by
            or checkpoint.validated_on != self.validation_photos.identity
        )
        if not self._validates_first:
            self.best_epoch.load(checkpoint.choice)
        self.folder.drop_metrics_after(self.epoch, self.step)

    def started(self) -> Started:
        return Started(
            captions=len(self.training_captions),
            photos=len(set(self.training_captions.feature_rows.tolist())),
            val_captions=len(self.validation_captions),
            vocab_size=len(self.vocabulary),
            parameters=sum(parameter.numel() for parameter in self.decoder.parameters()),
            epoch=self.epoch,
            step=self.step,
        )

    def epochs(self) -> Generator[TrainReport | None, None, None]:
        epochs = self.config.recipe.all_epochs
        if self._validates_first:
            with self.trainer.evaluation_weights():
                self._validate(self.epoch if self.step else self.epoch - 1)
        while self.epoch < epochs and not self._out_of_patience():
            started_at = time.perf_counter()
            yield from self._train_epoch()
            with self.trainer.evaluation_weights():
                val_loss, scores, best = self._validate(self.epoch)
                self._save_model("last.cap", val_loss, scores)
            log = EpochLog(
                epoch=self.epoch,
                epochs=epochs,
                val_loss=val_loss,
                bleu_4=scores.bleu_4,
                cider=scores.cider,
                distinct=scores.distinct / scores.count,
                best=best,
                seconds=time.perf_counter() - started_at,
            )
            self.metrics.write(
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

    def _validate(self, epoch: int) -> tuple[float, ValidationScores, bool]:
        """Score the decoder as it is, and save it if it is the best one so far.

        Returns (validation loss, scores, whether it is the best).
        """
        loss = self.trainer.validation_loss(self.validation_captions)
        val_loss = self._check_finite(loss, self.step)
        by_beam = self.config.select_by == "beam"
        search = SearchConfig() if by_beam else SearchConfig(beam_size=1)
        scores = self.validation_photos.score(self.decoder, self.vocabulary, search)
        rewarded = epoch >= self.config.recipe.epochs
        best = self.best_epoch.update(ValidatedEpoch(epoch, val_loss, scores.ciders, rewarded))
        if best:
            self._save_model("best.cap", val_loss, scores, epoch)
        return val_loss, scores, best

    def _out_of_patience(self) -> bool:
        patience, best = self.config.patience, self.best_epoch.best
        epochs_since_best = self.epoch - 1 - (best.epoch if best else -1)
        return patience is not None and epochs_since_best >= patience

    def _train_epoch(self) -> Generator[TrainReport | None, None, None]:
        """Train the rest of the current epoch, log, and save models in between."""
        log_every, reads_late = self.config.log_every, _reads_losses_late(self.device)
        losses: list[Tensor] = []
        captions, self._logged_at = 0, time.perf_counter()
        for result in self._train_steps():
            losses.append(result.loss)
            captions += result.captions
            self.step = result.step + 1
            if self._pending_log is not None:
                pending, self._pending_log = self._pending_log, None
                yield self._log(pending)
            save, last = self._is_time_to_save(), self.step == result.steps
            if self.step % log_every == 0 or last or save:
                mean_loss = torch.stack(losses).mean()
                pending = _PendingLog(self.step, result.steps, mean_loss, captions)
                losses.clear()
                captions = 0
                if reads_late and not (last or save):
                    self._pending_log = pending
                    yield None
                else:
                    yield self._log(pending)
            else:
                yield None
            if save:
                name = f"epoch-{self.epoch}-step-{self.step}.cap"
                with self.trainer.evaluation_weights():
                    self._save_model(name)
                self._save_checkpoint()
                yield Saved(self.folder.path / name)

    def _train_steps(self) -> Iterator[StepResult]:
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

    def _log(self, pending: _PendingLog) -> StepLog:
        """Read the loss, which waits for the device. Raises TrainError if it is not finite."""
        recipe, loss = self.config.recipe, self._check_finite(float(pending.loss), pending.step)
        now = time.perf_counter()
        seconds, self._logged_at = now - self._logged_at, now
        self.metrics.write({"epoch": self.epoch, "step": pending.step, "loss": loss})
        return StepLog(
            self.epoch,
            recipe.all_epochs,
            pending.step,
            pending.steps,
            loss,
            pending.captions / seconds,
            rewarded=self.epoch >= recipe.epochs,
            smoothed=recipe.label_smoothing > 0,
        )

    def _check_finite(self, loss: float, step: int) -> float:
        if math.isfinite(loss):
            return loss
        raise TrainError(
            f"{self.folder.path}: the loss is {loss} at epoch {self.epoch}, step {step}; "
            "lower --learning-rate (the last checkpoint is kept)"
        )

    def _is_time_to_save(self) -> bool:
        every = self.config.save_every
        if every is not None:
            return self.step % every == 0
        paused = time.monotonic() - self._saved_at >= SAVE_PAUSE_S
        return paused and self.step % SAVE_EVERY == 0

    def save_position(self) -> None:
        """Save the model and the checkpoint after an interruption between two steps."""
        if self._pending_log is not None:
            self._log(self._pending_log)
        with self.trainer.evaluation_weights():
            self._save_model("last.cap")
        self._save_checkpoint()

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
            "captions": len(self.training_captions),
            "config": run_settings(self.config),
        }
        bundle = Bundle(self.decoder, self.vocabulary, self.cache.encoder, facts)
        bundle.save(self.folder.path / name)

    def _save_checkpoint(self) -> None:
        self.folder.save_checkpoint(
            Checkpoint(
                settings=run_settings(self.config),
                data=data_identity(self.cache),
                trainer=self.trainer.state(),
                epoch=self.epoch,
                step=self.step,
                choice=self.best_epoch.state(),
                validated_on=self.validation_photos.identity,
            )
        )
        self._saved_at = time.monotonic()


def _load_data(
    config: TrainConfig, cache: FeatureCache, vocabulary: Vocabulary, device: torch.device
) -> tuple[CaptionSet, CaptionSet, ValidationPhotos]:
    """(training captions, validation captions, the validation photos with their references).

    Validation photos come from a cache of their own or are held out of the training cache.
    """
    if config.val_cache is not None:
        val_cache = open_cache(config.val_cache)
        difference = val_cache.encoder.difference(cache.encoder)
        if difference is not None:
            raise CacheError(f"{val_cache.path}: made with {difference} as in {cache.path}")
        training_rows = validation_rows = None
    else:
        val_cache = cache
        training_rows, validation_rows = split_photos(
            cache, held_out=config.val_share, seed=config.seed
        )
        if len(training_rows) == 1 and not len(validation_rows):
            raise TrainError(
                f"{config.from_cache}: only one photo has captions, so none can be held out; "
                "use --val-cache"
            )
    length = config.max_length
    try:
        training = caption_set(
            cache, vocabulary, rows=training_rows, device=device, max_length=length
        )
        validation = caption_set(
            val_cache,
            vocabulary,
            rows=validation_rows,
            device=device,
            max_length=length,
            features_from=training if val_cache is cache else None,
        )
    except torch.OutOfMemoryError:
        size = cache.features.nbytes + (0 if val_cache is cache else val_cache.features.nbytes)
        raise TrainError(
            f"{device}: no memory for {size / 1e9:.1f} GB of features; use --device cpu"
        ) from None
    return training, validation, ValidationPhotos(val_cache, rows=validation_rows)
