"""A training run: data and decoder set up, epochs trained, the best model chosen and saved.

`train` runs or resumes one. Its folder is described in `train.fit.record.run_folder`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.atomic import WriteError
from cache.create import size_text
from cache.store import open_cache
from train.config import SAVE_EVERY, SAVE_PAUSE_S, SearchConfig, TrainConfig
from train.device import is_out_of_memory, resolve_device
from train.fit.best_epoch import BEFORE_TRAINING, BestEpochTracker, ValidatedEpoch
from train.fit.data_recipe import FEW_CAPTIONS, fit_to_data
from train.fit.processes.follower import follow
from train.fit.processes.leader import leading, tell_epoch, tell_followers, with_own_device
from train.fit.record.drawn_curves import DrawnCurves
from train.fit.record.failures import (
    diverged,
    out_of_memory_as,
    too_large_decoder,
    too_large_rewarded_step,
    too_large_step,
    too_large_validation,
)
from train.fit.record.metrics import epoch_record, step_record
from train.fit.record.pace import Pace
from train.fit.record.run_folder import DATA_RULES, Checkpoint, RunFolder, TrainError
from train.fit.record.tensorboard import Board, check_tensorboard
from train.fit.reports import (
    Advice,
    EpochLog,
    OutOfPatience,
    Saved,
    Started,
    StartScores,
    StepLog,
    TrainReport,
)
from train.fit.resume import (
    check_resumable,
    data_identity,
    recorded_window,
    resumed_photos,
    run_settings,
    window_tensor,
)
from train.fit.run_data import load_run_data, with_settled_window
from train.fit.trainer import StepResult, Trainer
from train.fit.validation import ValidationScores
from train.model.bundle import Bundle, load_bundle, read_training
from train.model.start_model import load_start_model, new_decoder
from train.step.cuda.kernel_choice import begin_kernels
from train.step.objective import product_dtype
from train.step.processes.group import Processes
from train.step.processes.launch import ProcessesError
from train.step.update.optimizer import learning_rate


def train(
    config: TrainConfig,
    *,
    saves_within_epochs: bool = True,
    notice_of_curves: Callable[[str], object] | None = None,
    processes: Processes | None = None,
) -> Generator[TrainReport | None, None, None]:
    """Train as configured. Yields a report, or None, after every step.

    Closing the generator between two steps saves the run, so that it can be resumed at that step.
    The files of finished epochs are written after `SAVE_PAUSE_S` and when training ends, also with
    an error. saves_within_epochs: also save models within epochs, as `save_every` says.
    notice_of_curves: draw the run's curves, and call this with one line if that fails; None: do not
    draw. processes: those that train together; all of them call this, with the same configuration.
    Only the first one reports and writes. The others yield None after each step. If the first one
    ends early, their processes end there and then. In the end all are disconnected.

    Raises CacheError, TrainError, VocabularyError, TrainingSetError, ProcessesError or WriteError.
    """
    if processes is not None and not processes.leads:
        yield from follow(config, processes)
        return
    with leading(processes), RunFolder(config.out) as folder:
        if config.tensorboard:
            check_tensorboard()
        if processes is not None:
            config = with_own_device(config, processes)
        try:
            run = _Run(
                config,
                folder,
                saves_within_epochs=saves_within_epochs,
                notice_of_curves=notice_of_curves,
                processes=processes,
            )
            with run.curves, run.metrics, run.board:
                try:
                    yield run.started()
                    yield from run.epochs()
                except GeneratorExit:
                    run.save_position()
                    raise
                finally:
                    run.curves.draw_last()  # meanwhile, the models are written
                    folder.write_kept()
        except WriteError as error:
            raise folder.failure(error) from None
        except ProcessesError as error:
            raise ProcessesError(f"{config.out}: {error}; {folder.how_to_go_on()}") from None


@dataclass(frozen=True)
class _PendingLog:
    """The steps behind a log line, whose loss has not been read from the device yet."""

    step: int  # the last of these steps
    steps: int  # in the epoch
    loss: Tensor
    captions: int
    count: int  # of these steps


def _reads_losses_late(device: torch.device) -> bool:
    """Whether to read a loss only once the next step is queued.

    Reading waits for the device. On a GPU the host then queues the next step meanwhile.
    """
    return device.type == "cuda"


# A mean loss beyond this gives the true words a probability of 1e-13 each. No model that has
# learned something does that, however much it overfits.
_DIVERGED_LOSS = 30.0
# How many of the models saved within epochs are kept, unless the user asked for them. On a GPU one
# of some 30 MB is saved every 10 s.
_KEPT_MODELS = 3
# Of the vocabulary in a model file, about.
_BYTES_PER_WORD = 24


class _Run:
    """A run between two steps. `epoch` and `step` are those of the next step to train."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        *,
        saves_within_epochs: bool,
        notice_of_curves: Callable[[str], object] | None,
        processes: Processes | None = None,
    ) -> None:
        self._saves_within_epochs = saves_within_epochs
        self.folder = folder
        self._processes = processes
        self.device = resolve_device(config.device)
        if self.device.index is not None:
            # Seeds and graphs belong to the current device.
            torch.cuda.set_device(self.device)
        begin_kernels(self.device, product_dtype(self.device, config.precision))
        cache = open_cache(config.from_cache)
        self.cache = cache
        checkpoint = folder.read_checkpoint() if config.resume else None
        self.data_rules = DATA_RULES if checkpoint is None else checkpoint.data_rules
        recorded = None if checkpoint is None else checkpoint.settings
        window = recorded_window(checkpoint) if checkpoint is not None and checkpoint.step else None
        config, recipe = fit_to_data(config, cache, recorded)
        self.config, self.recipe = config, recipe
        start = load_start_model(config.from_model, cache) if config.from_model else None
        self._identity = data_identity(cache) | {"from_model": start.sha256 if start else ""}
        if processes is not None:
            if window is None:
                config = self.config = with_settled_window(config, cache, self.device)
            tell_followers(
                processes,
                self.device,
                recorded=recorded,
                rules=self.data_rules,
                settings=run_settings(config),
                data=self._identity,
                window=config.window,
                interrupted=window,
            )
        self.data = load_run_data(
            config, recipe, cache, self.device, self.data_rules, start, window
        )
        self.vocabulary = self.data.vocabulary
        self.training_captions = self.data.training_captions
        self.validation_captions = self.data.validation_captions
        self.validation_photos = self.data.validation_photos
        torch.manual_seed(config.seed)
        self._steps = self._steps_of_epochs()
        self._check_save_every()
        with out_of_memory_as(lambda: too_large_decoder(self.device, recipe, len(self.vocabulary))):
            decoder = new_decoder(
                recipe, cache, self.vocabulary, start, len(self.training_captions)
            )
            self.decoder = decoder.to(self.device)
            self.trainer = Trainer(
                self.decoder,
                self.training_captions,
                recipe,
                seed=config.seed,
                vocabulary=self.vocabulary,
                precision=config.precision,
                plain=config.plain,
                processes=processes,
            )
        if processes is not None:
            processes.use(self.device)  # also waits for the others, before any file is touched
        self.epoch, self.step = 0, 0
        # (N,) photos of the training cache: those of an epoch, those that any step has trained on.
        self._training = np.zeros(len(cache), bool)
        self._training[self.training_captions.feature_rows] = True
        self._trained_on = np.zeros(len(cache), bool)
        self.best_epoch = BestEpochTracker(by_loss=config.select_by == "loss")
        self._validates_first = False
        self._scores_start = start is not None and checkpoint is None
        self._pending_log: _PendingLog | None = None
        # Epoch and step of the newest checkpoint and of last.cap, in the folder or to be written.
        self._checkpoint_at: tuple[int, int] | None = None
        self._last_model_at: tuple[int, int] | None = None
        if checkpoint is not None:
            self._resume(checkpoint)
        else:
            self.folder.start(overwrite=config.overwrite, needed_bytes=self._needed_bytes())
        if processes is not None:
            self.trainer.start_together()
        self.metrics = self.folder.open_metrics()
        self.board = Board(folder.path if config.tensorboard else None, self._all_steps())
        self.curves = DrawnCurves(folder.path, notice_of_curves)
        self._saved_at = time.monotonic()
        self._pace = Pace(recipe, config.log_every)

    def _resume(self, checkpoint: Checkpoint) -> None:
        check_resumable(checkpoint, self.config, self.recipe, self._identity)
        self.trainer.load(checkpoint.trainer)
        self.folder.check_space(self._needed_bytes())
        self.epoch, self.step = self._checkpoint_at = checkpoint.epoch, checkpoint.step
        if (self.folder.path / "last.cap").exists():
            self._last_model_at = self._checkpoint_at
        self._trained_on, same_validation = resumed_photos(
            checkpoint,
            self.config,
            self.cache,
            training=self._training,
            validation=self.validation_photos,
        )
        # Scores by another measure or of other photos do not compare with those before.
        self._validates_first = (
            checkpoint.settings["select_by"] != self.config.select_by or not same_validation
        )
        if not self._validates_first:
            self.best_epoch.load(checkpoint.choice)
        self.folder.drop_metrics_after(self.epoch, self.step)

    def started(self) -> Started:
        return Started(
            captions=len(self.training_captions),
            photos=int(self._training.sum()),
            val_captions=len(self.validation_captions),
            vocab_size=len(self.vocabulary),
            by_loss=self.config.select_by == "loss",
            min_count=self.recipe.min_count,
            batch_size=self.recipe.batch_size,
            epochs=self.recipe.epochs,
            epoch_steps=self._epoch_steps,
            patience_steps=self.recipe.patience_steps,
            parameters=sum(parameter.numel() for parameter in self.decoder.parameters()),
            epoch=self.epoch,
            step=self.step,
            copies=self.data.copies,
            val_photos=len(self.validation_photos.rows),
            val_photos_trained_on=self.data.val_photos_trained_on,
            processes=1 if self._processes is None else self._processes.count,
            window=self._window_line(),
        )

    def _window_line(self) -> str:
        """What is streamed, in one line; empty if all features are in memory."""
        stream = self.training_captions.stream
        if stream is None:
            return ""
        reason = self.data.memory.reason
        block = stream.layout.block_photos * self.cache.features[:1].nbytes
        return (
            f"{size_text(self.cache.features.nbytes)} of features{reason and f' are {reason}'}: "
            f"{size_text(stream.size_bytes)} of them in memory at a time, half of which is read "
            f"while half is trained on: {stream.layout.photos:,} photos in shuffled blocks of "
            f"{size_text(block)}"
        )

    def epochs(self) -> Generator[TrainReport | None, None, None]:
        recipe = self.recipe
        epochs = recipe.all_epochs
        if self._validates_first:
            with out_of_memory_as(self._too_large_validation):
                self._judge_anew()
        if self._scores_start:
            self.decoder.eval()
            with out_of_memory_as(self._too_large_validation):
                loss, scores, _ = self._validate(BEFORE_TRAINING)
            self._scores_start = False
            yield StartScores(loss, scores.bleu_4, scores.cider)
        while self.epoch < epochs:
            rewarded = self.epoch >= recipe.epochs
            planned = epochs if rewarded else recipe.epochs  # the end of this kind of epochs
            if self._out_of_patience():
                follows = recipe.self_critical_epochs and not rewarded
                waited = None if self.config.patience else self.recipe.patience_steps
                yield OutOfPatience(self.epoch, planned, bool(follows), steps=waited)
                if not follows:
                    break
                self.epoch = recipe.epochs
                continue
            started_at = time.perf_counter()
            from_start = self.step == 0
            yield from self._train_epoch()
            self._check_weights()
            trained_at = time.perf_counter()
            val_loss, scores, best = self._validate_epoch()
            now = time.perf_counter()
            seconds = now - started_at
            if from_start:
                self._pace.end_epoch(seconds, now - trained_at)
            log = EpochLog(
                epoch=self.epoch,
                epochs=epochs,
                val_loss=val_loss,
                bleu_4=scores.bleu_4,
                cider=scores.cider,
                distinct=scores.distinct / scores.count,
                best=best,
                seconds=seconds,
                steps=None if rewarded else (self.epoch + 1) * self._epoch_steps,
                seconds_left=seconds * (planned - self.epoch - 1),
                photos=scores.count,
                all_steps=self._all_steps(),
            )
            self.metrics.write(epoch_record(log))
            self.board.add_epoch(log)
            self.epoch, self.step = self.epoch + 1, 0
            if self.epoch < epochs:
                self.curves.prepare()
            self._last_model_at = self.epoch, self.step
            self._keep_checkpoint()
            # A kill costs no more than the pause, or than one epoch if that is longer.
            if self.epoch == epochs or self._since_saved() + seconds > SAVE_PAUSE_S:
                self._write_kept()
            yield log
        advice = self._advice()
        if advice is not None:
            yield advice

    def _advice(self) -> Advice | None:
        """What helps, if the best model's captions mean little or there is little to learn from."""
        self._write_kept()
        doubt = read_training(self.folder.path / "best.cap").get("degenerate")
        captions = len(self.training_captions)
        if doubt is None and captions >= FEW_CAPTIONS:
            return None
        return Advice(captions, str(doubt) if doubt else None)

    def _validate_epoch(self) -> tuple[float, ValidationScores, bool]:
        """As `_validate`, of the epoch that has just been trained; its model becomes last.cap."""
        with out_of_memory_as(self._too_large_validation):
            try:
                with self.trainer.evaluation_weights():
                    val_loss, scores, best = self._validate(self.epoch)
                    if best:
                        self.folder.keep_again("best.cap", "last.cap")
                    else:
                        self._keep_model("last.cap", val_loss, scores)
            except (RuntimeError, MemoryError):
                self._keep_checkpoint()  # the run goes on with the validation
                raise
        return val_loss, scores, best

    def _judge_anew(self) -> None:
        """Score the best model so far and the present one. The better one becomes the best."""
        path = self.folder.path / "best.cap"
        if path.exists():
            standing = load_bundle(path, self.device)
            try:
                with self.trainer.weights_of(standing.decoder):
                    self._validate(standing.training["epoch"], standing.training)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise TrainError(
                    f"{path}: not a model of this run (other sizes); move it away, or name "
                    "another --out"
                ) from None
        if self.epoch or self.step:
            with self.trainer.evaluation_weights():
                self._validate(self.epoch if self.step else self.epoch - 1)
        self._validates_first = False
        self._keep_checkpoint()  # the next resumption compares with the new scores
        self._write_kept()

    def _validate(
        self, epoch: int, facts: Mapping[str, Any] | None = None
    ) -> tuple[float, ValidationScores, bool]:
        """Score the decoder as it is, and save it if it is the best one so far.

        facts: about the training of a model that was saved before; None: of the present one.
        Returns (validation loss, scores, whether it is the best).
        """
        loss = self.trainer.validation_loss(self.validation_captions)
        val_loss = self._check_finite(loss, self.step)
        if facts is None and val_loss > _DIVERGED_LOSS:
            raise self._divergence(f"the validation loss is {val_loss:.4g}", self.step)
        by_beam = self.config.select_by == "beam"
        search = SearchConfig() if by_beam else SearchConfig(beam_size=1)
        scores = self.validation_photos.score(self.decoder, self.vocabulary, search)
        rewarded = epoch >= self.recipe.epochs
        best = self.best_epoch.update(ValidatedEpoch(epoch, val_loss, scores.ciders, rewarded))
        if best:
            facts = facts or self._facts() | {"epoch": epoch}
            settings = {**facts["config"], "select_by": self.config.select_by}
            facts = {**facts, "config": settings, "judged_on": self._judged_on()}
            self._keep_model("best.cap", val_loss, scores, facts)
        return val_loss, scores, best

    def _out_of_patience(self) -> bool:
        """Whether too many epochs of the present kind, all finished, have brought no better model.

        Self-critical epochs are counted for themselves.
        """
        patience, best = self.config.patience, self.best_epoch.best
        if self.step:
            return False
        rewarded = self.epoch >= self.recipe.epochs
        after_best = best.epoch + 1 if best else 0
        waited = self.epoch - max(after_best, self.recipe.epochs if rewarded else 0)
        if patience is not None:
            return waited >= patience
        steps = self.recipe.patience_steps
        return steps is not None and not rewarded and waited * self._epoch_steps >= steps

    @property
    def _epoch_steps(self) -> int:
        """Steps of an epoch by cross-entropy."""
        return math.ceil(len(self.training_captions) / self.recipe.batch_size)

    def _train_epoch(self) -> Generator[TrainReport | None, None, None]:
        """Train the rest of the current epoch, log, and save models in between."""
        reads_late = _reads_losses_late(self.device)
        losses: list[Tensor] = []
        captions, first_step = 0, self.step
        self._pace.begin_epoch()
        for result in self._train_steps():
            if result.step == first_step:
                self._trained_on |= self._training
            losses.append(result.loss)
            captions += result.captions
            self.step = result.step + 1
            if self._pending_log is not None:
                pending, self._pending_log = self._pending_log, None
                yield self._log(pending)
            save, last = self._is_time_to_save(), self.step == result.steps
            if self._pace.is_time_to_log(self.step, len(losses)) or last or save:
                mean_loss = torch.stack(losses).mean()
                pending = _PendingLog(self.step, result.steps, mean_loss, captions, len(losses))
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
                self._check_weights()
                name = f"epoch-{self.epoch}-step-{self.step}.cap"
                with self.trainer.evaluation_weights():
                    self._keep_model(name)
                self._keep_checkpoint()
                self._write_kept()
                if self.config.save_every is None:
                    self.folder.remove_older_models(_KEPT_MODELS)
                yield Saved(self.folder.path / name)

    def _train_steps(self) -> Iterator[StepResult]:
        if self._processes is not None:
            tell_epoch(self._processes, self.epoch, self.step)
        steps = self.trainer.epoch(self.epoch, self.step)
        while True:
            with out_of_memory_as(self._too_large_step):
                step = next(steps, None)
            if step is None:
                return
            yield step

    def _too_large_step(self) -> str:
        recipe = self.recipe
        if self.epoch >= recipe.epochs:
            begun = self._checkpoint_at is not None and self._checkpoint_at > (recipe.epochs, 0)
            return too_large_rewarded_step(self.device, recipe, begun=begun)
        return too_large_step(self.device, recipe, saved=self._checkpoint_at is not None)

    def _too_large_validation(self) -> str:
        return too_large_validation(self.device, self.config.select_by)

    def _log(self, pending: _PendingLog) -> StepLog:
        """Read the loss, which waits for the device. Raises TrainError if it is not finite."""
        recipe, loss = self.recipe, self._check_finite(float(pending.loss), pending.step)
        seconds = self._pace.since_last_line()
        steps_left = pending.steps - pending.step
        log = StepLog(
            self.epoch,
            recipe.all_epochs,
            pending.step,
            pending.steps,
            loss,
            pending.captions / seconds,
            rewarded=self.epoch >= recipe.epochs,
            smoothed=recipe.label_smoothing > 0,
            learning_rate=self._learning_rate(pending),
            steps_per_s=pending.count / seconds,
            all_steps=self._all_steps() - self.step + pending.step,
            seconds_left=self._pace.seconds_left(self.epoch, steps_left, seconds / pending.count),
        )
        self.metrics.write(step_record(log))
        self.board.add_steps(log)
        self.curves.draw_if_due()
        return log

    def _learning_rate(self, pending: _PendingLog) -> float:
        """Of the last of the steps."""
        recipe = self.recipe
        if self.epoch >= recipe.epochs:
            return recipe.self_critical_rate
        position = self.epoch * pending.steps + pending.step - 1
        return learning_rate(recipe, position, recipe.epochs * pending.steps)

    def _all_steps(self) -> int:
        """Steps since the start of training."""
        steps, rewarded_steps = self._steps
        epochs = self.recipe.epochs
        rewarded = max(0, self.epoch - epochs)
        return min(self.epoch, epochs) * steps + rewarded * rewarded_steps + self.step

    def _check_finite(self, loss: float, step: int) -> float:
        if not math.isfinite(loss):
            raise self._divergence(f"the loss is {loss}", step)
        return loss

    def _check_weights(self) -> None:
        """Raise TrainError rather than save weights that are not finite."""
        if not self.trainer.is_finite():
            raise self._divergence("the weights are not finite", self.step)

    def _divergence(self, what: str, step: int) -> TrainError:
        return diverged(
            f"{self.folder.path}: {what}", self.recipe, (self.epoch, step), self._checkpoint_at
        )

    def _steps_of_epochs(self) -> tuple[int, int]:
        """The number of steps in each epoch, and in each self-critical one; 0 if there are none."""
        recipe, captions = self.recipe, self.training_captions
        steps = math.ceil(len(captions) / recipe.batch_size)
        if not recipe.self_critical_epochs:
            return steps, 0
        photos = len(np.unique(captions.feature_rows))
        return steps, math.ceil(photos / recipe.self_critical_photos)

    def _check_save_every(self) -> None:
        """Raise TrainError if `save_every` saves no model at all."""
        every, steps = self.config.save_every, max(self._steps)
        if every is not None and every > steps:
            raise TrainError(
                f"{self.config.out}: no epoch has more than {steps:,} steps, and steps are counted "
                f"anew in each, so --save-every {every:,} saves nothing; lower it or leave it out"
            )

    def _needed_bytes(self) -> int:
        """Disk space for all files of the run, while the checkpoint is being replaced."""
        every, recipe = self.config.save_every, self.recipe
        weights = self.trainer.parameters.values.nbytes
        model = weights + _BYTES_PER_WORD * len(self.vocabulary)
        # Weights, two moments and the average.
        checkpoint = (3 + bool(recipe.average_decay)) * weights
        steps, rewarded_steps = self._steps
        models = 2
        if not self._saves_within_epochs:
            pass
        elif every is not None:
            # With patience, only one epoch is certain.
            epochs = recipe.epochs if self.config.patience is None else 1
            models += epochs * (steps // every)
            models += recipe.self_critical_epochs * (rewarded_steps // every)
        elif max(steps, rewarded_steps) >= SAVE_EVERY:
            models += _KEPT_MODELS
        return models * model + 2 * checkpoint

    def _is_time_to_save(self) -> bool:
        if not self._saves_within_epochs:
            return False
        every = self.config.save_every
        if every is not None:
            return self.step % every == 0
        return self._since_saved() >= SAVE_PAUSE_S and self.step % SAVE_EVERY == 0

    def _since_saved(self) -> float:
        """Seconds since files were written."""
        return time.monotonic() - self._saved_at

    def save_position(self) -> None:
        """Save the model and the checkpoint after an interruption between two steps."""
        if self._validates_first:
            return  # nothing has happened yet, and the checkpoint in the folder is as it should be
        if self._pending_log is not None:
            self._log(self._pending_log)
        position = self.epoch, self.step
        if not position == self._checkpoint_at == self._last_model_at:
            self._check_weights()
        if position != self._last_model_at:
            with self.trainer.evaluation_weights():
                self._keep_model("last.cap")
        if position != self._checkpoint_at:
            self._keep_checkpoint()
        self._write_kept()

    def _keep_model(
        self,
        name: str,
        val_loss: float | None = None,
        scores: ValidationScores | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Have the decoder saved as it is now. facts: as in `_validate`."""
        facts = {
            **(facts or self._facts()),
            "val_loss": val_loss,
            "scores": scores.as_dict() if scores else None,
        }
        facts.pop("degenerate", None)  # of the same model, as it was judged before
        if scores is not None and scores.degenerate is not None:
            facts["degenerate"] = scores.degenerate
        decoder = copy.deepcopy(self.decoder).cpu()  # training changes the decoder
        model = Bundle(decoder, self.vocabulary, self.cache.encoder, facts)
        self.folder.keep_model(name, model)

    def _facts(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "captions": len(self.training_captions),
            "config": run_settings(self.config),
            "trained_on": {
                "cache": self.cache.path.name,
                "photos": int(self._training.sum()),
                "captions": len(self.training_captions),
            },
            "judged_on": self._judged_on(),
        }

    def _judged_on(self) -> dict[str, str | int]:
        """What the validation scores are of: those of equal `id` compare."""
        photos = self.validation_photos
        return {
            "id": photos.content_sha256,
            "cache": photos.cache_name,
            "photos": len(photos.rows),
            "captions": len(self.validation_captions),
        }

    def _keep_checkpoint(self) -> None:
        self.folder.keep_checkpoint(
            Checkpoint(
                settings=run_settings(self.config),
                data=self._identity,
                trainer=self.trainer.state(),
                epoch=self.epoch,
                step=self.step,
                choice=self.best_epoch.state(),
                validated_on=self.validation_photos.identity,
                data_rules=self.data_rules,
                photos={
                    "training": torch.from_numpy(self._training),
                    "trained_on": torch.from_numpy(self._trained_on.copy()),  # training changes it
                    "validation": torch.from_numpy(self.validation_photos.rows),
                    "window": window_tensor(self.training_captions.stream),
                },
            )
        )
        self._checkpoint_at = self.epoch, self.step

    def _write_kept(self) -> None:
        self.folder.write_kept()
        self._saved_at = time.monotonic()
