"""The folder of a training run: its models, its checkpoint and its log.

    runs/base/
      best.cap         the model with the best validation scores
      last.cap         the model after the last epoch, or where the run was interrupted
      epoch-0-step-1000.cap …   a model every `save_every` steps; if that is not set, the last three
                       of those saved at intervals
      metrics.jsonl    one JSON object for each log line and each epoch
      curves.png       what metrics.jsonl says, drawn; by `cap train`
      tensorboard/     the same for TensorBoard, if asked for
      checkpoint.pt    decoder, optimizer and position, which `--resume` reads
      run.lock         empty; there while a process trains, which has it locked

Models and checkpoints are written to a temporary file, which is then renamed. A `.cap` file is all
that prediction needs. In a finished run, `checkpoint.pt` only serves to train more epochs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from cache.atomic import WriteError, still_named, write_atomically
from cache.errors import CapError
from train.fit.record.curves import is_ours
from train.fit.record.metrics import MetricsLog, drop_after
from train.model.bundle import Bundle

CHECKPOINT_VERSION = 3

# How a run splits its photos and counts its words, which a resumed run must not change:
# 1, as 0.1.0 did: copies of a photo may be on both sides; all captions of the cache are counted.
# 2: copies stay on one side; only the captions that are trained on are counted; where many captions
# have more words than `max_length`, the cut is further behind.
DATA_RULES = 2


class TrainError(CapError):
    """Raised when a run cannot start or continue. The message is one line."""


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to continue. In the file, the names of the fields are the keys."""

    settings: dict[str, Any]  # as `run_settings` gives them
    data: dict[str, str]  # as `data_identity` gives it; older checkpoints have fewer members
    trainer: dict[str, Any]  # as `Trainer.state` gives it
    epoch: int  # epoch and step of the next step to train
    step: int
    choice: dict[str, Any]  # as `BestEpochTracker.state` gives it
    validated_on: str  # `ValidationPhotos.identity`
    data_rules: int = 1  # as `DATA_RULES`; 0.1.0 wrote none
    # `training` and `trained_on`, (N,) bool: the photos of the training cache that an epoch trains
    # on, and those that any step has trained on. `validation`, (K,) int64: the rows of the
    # validation photos in their cache. `window`, (3,) int64: the fields of a `Layout`, or zeros;
    # earlier versions wrote none. 0.1.0 recorded none of these.
    photos: dict[str, Tensor] | None = None


class RunFolder:
    """Reads and writes the files of a run. `start` or `read_checkpoint` comes first.

    Both lock the folder against other processes until the context ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checkpoint = path / "checkpoint.pt"
        self._metrics = path / "metrics.jsonl"
        self._lock = path / "run.lock"
        self._lock_fd: int | None = None
        self._made = False
        # Not yet written: models by file name, in the order of writing, and a checkpoint.
        self._kept_models: dict[str, Bundle] = {}
        self._kept_checkpoint: Checkpoint | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock_fd is not None:
            with contextlib.suppress(OSError):
                self._lock.unlink(missing_ok=True)
            os.close(self._lock_fd)
            self._lock_fd = None
        if self._made:
            with contextlib.suppress(OSError):  # it is not empty
                self.path.rmdir()

    def _take_lock(self) -> None:
        """Raises TrainError if another process trains into the folder."""
        attempt = 0
        while self._lock_fd is None:
            try:
                fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise TrainError(f"{self.path}: cannot write there ({error.strerror})") from None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if still_named(fd, self._lock, attempt):
                    self._lock_fd = fd
            except BlockingIOError:
                raise TrainError(
                    f"{self.path}: another process is training into it; "
                    "wait until it ends, or name another --out"
                ) from None
            except FileNotFoundError:
                pass  # the other process has just ended and removed the file: try again
            except OSError as error:
                raise TrainError(f"{self.path}: cannot lock ({error.strerror})") from None
            finally:
                if self._lock_fd != fd:
                    os.close(fd)
                attempt += 1

    def start(self, *, overwrite: bool, needed_bytes: int = 0) -> None:
        """Make the folder.

        Raises TrainError if it holds a run and `overwrite` is off, or if the run's files, of
        `needed_bytes` together, do not fit on its disk.
        """
        try:
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainError(f"{self.path}: cannot make the folder ({error.strerror})") from None
        self._take_lock()
        earlier_run = self._files()
        if earlier_run and not overwrite:
            found = "a run; continue it with --resume," if self.has_checkpoint() else "a model;"
            raise TrainError(
                f"{self.path}: already holds {found} replace it with --overwrite, "
                "or name another --out"
            )
        self.check_space(needed_bytes)
        for path in [*earlier_run, self._metrics, *self._pictures()]:
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """The models and the checkpoint of a run. Other models in the folder are not its own."""
        written = ("best.cap", "last.cap", "epoch-[0-9]*-step-[0-9]*.cap", "checkpoint.pt")
        return [path for name in written for path in self.path.glob(name)]

    def _pictures(self) -> list[Path]:
        """The curves of an earlier run, drawn and for TensorBoard."""
        drawn = self.path / "curves.png"
        events = list((self.path / "tensorboard").glob("events.out.tfevents.*"))
        return events + ([drawn] if is_ours(drawn) else [])

    def check_space(self, needed_bytes: int) -> None:
        """Raise TrainError if files of `needed_bytes` do not fit, in the place of those there."""
        there = [path.stat() for path in self._files()]
        sizes = {status.st_ino: status.st_size for status in there}  # linked files once
        missing = needed_bytes - sum(sizes.values())
        free = shutil.disk_usage(self.path).free
        if missing > free:
            raise TrainError(
                f"{self.path}: needs {missing / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; "
                "free some, or name another --out"
            )

    def remove_older_models(self, kept: int) -> None:
        """Remove the models saved within epochs, apart from the newest `kept`."""
        models = list(self.path.glob("epoch-[0-9]*-step-[0-9]*.cap"))
        models.sort(key=lambda path: tuple(map(int, path.stem.split("-")[1::2])))
        for path in models[:-kept]:
            path.unlink(missing_ok=True)

    def has_checkpoint(self) -> bool:
        return self._checkpoint.exists()

    def read_checkpoint(self) -> Checkpoint:
        """Raises TrainError if there is no checkpoint, or if it is damaged or of another format."""
        path = self._checkpoint
        if self.path.is_dir():
            self._take_lock()
        if not self.has_checkpoint():
            begin = "give --overwrite to begin anew" if self._files() else "leave out --resume"
            raise TrainError(f"{self.path}: nothing to resume (no checkpoint.pt); {begin}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            version = state["version"]
        except Exception as error:  # torch.load raises a dozen types for damaged files
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TrainError(f"{path}: cannot read ({reason[:120]})") from None
        if version != CHECKPOINT_VERSION:
            raise TrainError(f"{path}: format {version}, this program reads {CHECKPOINT_VERSION}")
        known = {field.name for field in fields(Checkpoint)}
        try:
            return Checkpoint(**{name: value for name, value in state.items() if name in known})
        except TypeError:
            raise TrainError(f"{path}: cannot read (it is incomplete)") from None

    def keep_model(self, name: str, model: Bundle) -> None:
        """Have a model written by the next `write_kept`. Its decoder must not change until then."""
        self._kept_models[name] = model

    def keep_again(self, name: str, other: str) -> None:
        """Have a model that is kept written under another name as well."""
        self._kept_models[other] = self._kept_models[name]

    def keep_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Have a checkpoint written by the next `write_kept`, after the models."""
        self._kept_checkpoint = checkpoint

    def write_kept(self) -> None:
        """Write what was kept and is not yet written. Raises WriteError.

        A model of two names is written once and linked to the other, which takes no more space.
        """
        written: dict[int, Path] = {}
        for name, model in list(self._kept_models.items()):
            path = self.path / name
            if not (id(model) in written and _link(written[id(model)], path)):
                model.save(path)
            written[id(model)] = path
            del self._kept_models[name]
        if self._kept_checkpoint is not None:
            self._write_checkpoint(self._kept_checkpoint)
            self._kept_checkpoint = None

    def failure(self, error: WriteError) -> WriteError:
        """The error of a run that cannot write, with what to do then."""
        return WriteError(f"{error}; free space or mend the disk, then {self.how_to_go_on()}")

    def how_to_go_on(self) -> str:
        """What to do after a run has failed for a reason that is gone."""
        if self.has_checkpoint():
            return "go on with --resume"
        return f"run the command again{' with --overwrite' if self._files() else ''}"

    def _write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint. Raises WriteError."""
        state = {"version": CHECKPOINT_VERSION, **vars(checkpoint)}

        def write(temporary: Path) -> None:
            try:
                with temporary.open("wb") as file:
                    torch.save(state, file)
            except RuntimeError as error:
                # torch.save reports a full disk as its own RuntimeError, raised from the OSError.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

        write_atomically(self._checkpoint, write)

    def drop_metrics_after(self, epoch: int, step: int) -> None:
        """Remove the log lines of steps beyond this position, which will be trained again.

        Raises WriteError.
        """
        drop_after(self._metrics, epoch, step)

    def open_metrics(self) -> MetricsLog:
        """The log, to append to. Raises WriteError."""
        return MetricsLog(self._metrics)


def validated_on(run: Path) -> str | None:
    """`Checkpoint.validated_on` of a run's folder; None without a checkpoint that says it.

    No tensor is read.
    """
    try:
        state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        return str(state["validated_on"])
    except Exception:  # torch.load raises a dozen types for damaged files
        return None


def _link(old: Path, new: Path) -> bool:
    """Replace `new` by a hard link to `old`. Returns whether the file system can do that."""

    def link(temporary: Path) -> None:
        temporary.unlink()
        os.link(old, temporary)

    try:
        write_atomically(new, link)
    except WriteError:
        return False
    return True
