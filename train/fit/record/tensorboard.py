"""Writes a run's curves for TensorBoard, beside its log. TensorBoard is an optional extra."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from train.fit.record.run_folder import TrainError
from train.fit.reports import EpochLog, StepLog

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

FOLDER = "tensorboard"  # in the run's folder


def check_tensorboard() -> None:
    """Raises TrainError if TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise TrainError(
            "--tensorboard needs TensorBoard; get it with `pip install 'tensorboard>=2.18'`, "
            "or leave the option out (curves.png is drawn without it)"
        ) from None


class Board:
    """The curves in TensorBoard's files. A context manager closes them.

    Steps count from the start of training. If the files cannot be written, the rest is left out:
    the log has it all.
    """

    def __init__(self, run: Path | None, first_step: int) -> None:
        """run: the run's folder; None: write nothing. first_step: where training goes on; what
        was written beyond, by a run that was interrupted, TensorBoard then leaves out.
        """
        self._writer: SummaryWriter | None = None
        if run is None:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        with contextlib.suppress(OSError):
            self._writer = SummaryWriter(
                str(run / FOLDER), purge_step=first_step + 1 if first_step else None
            )

    def add_steps(self, log: StepLog) -> None:
        values = {
            "train/learning_rate": log.learning_rate,
            "train/steps_per_s": log.steps_per_s,
            "train/captions_per_s": log.captions_per_s,
        }
        if log.rewarded:
            values["train/reward"] = -log.loss
        else:
            values["train/loss"] = log.loss
        if log.perplexity is not None:
            values["train/perplexity"] = log.perplexity
        self._add(values, log.all_steps)

    def add_epoch(self, log: EpochLog) -> None:
        values = {
            "validation/loss": log.val_loss,
            "validation/perplexity": log.perplexity,
            "validation/CIDEr": log.cider,
            "validation/BLEU-4": log.bleu_4,
        }
        self._add(values, log.all_steps)
        if self._writer is not None:
            with self._or_none():
                self._writer.flush()

    def _add(self, values: dict[str, float], step: int) -> None:
        if self._writer is None:
            return
        with self._or_none():
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    @contextlib.contextmanager
    def _or_none(self) -> Iterator[None]:
        """A context after whose failure nothing more is written."""
        try:
            yield
        except OSError:
            self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
