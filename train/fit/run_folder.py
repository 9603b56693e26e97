"""The folder of a training run: its checkpoint, its log, and what a resumed run may change.

    runs/base/
      best.cap         the model with the best validation scores
      last.cap         the model after the last epoch, or where the run was interrupted
      epoch-0-step-1000.cap …   a model every `save_every` steps; if that is not set, the last three
                       of those saved at intervals
      metrics.jsonl    one JSON object for each log line and each epoch
      checkpoint.pt    decoder, optimizer and position, which `--resume` reads
      run.lock         empty; there while a process trains, which has it locked

Models and checkpoints are written to a temporary file, which is then renamed. A `.cap` file is all
that prediction needs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.atomic import WriteError, write_atomically, write_text
from cache.errors import CapError
from cache.store import FeatureCache
from train.config import Recipe, TrainConfig

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
    # validation photos in their cache. 0.1.0 did not record them.
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

    def _take_lock(self) -> None:
        """Raises TrainError if another process trains into the folder."""
        while self._lock_fd is None:
            try:
                fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise TrainError(f"{self.path}: cannot write there ({error.strerror})") from None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(fd), os.stat(self._lock)):
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

    def start(self, *, overwrite: bool) -> None:
        """Make the folder. Raises TrainError if it holds a run and `overwrite` is off."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainError(f"{self.path}: cannot make the folder ({error.strerror})") from None
        self._take_lock()
        # Other models in the folder are not this run's, and stay.
        written = ("best.cap", "last.cap", "epoch-[0-9]*-step-[0-9]*.cap", "checkpoint.pt")
        earlier_run = [path for name in written for path in self.path.glob(name)]
        if earlier_run and not overwrite:
            found = "a run; continue it with --resume," if self.has_checkpoint() else "a model;"
            raise TrainError(
                f"{self.path}: already holds {found} replace it with --overwrite, "
                "or name another --out"
            )
        for path in [*earlier_run, self._metrics]:
            path.unlink(missing_ok=True)

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
        if not self.has_checkpoint():
            raise TrainError(f"{self.path}: nothing to resume (no checkpoint.pt)")
        self._take_lock()
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

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
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
        """Remove the log lines of steps beyond this position, which will be trained again."""
        if not self._metrics.exists():
            return
        kept = []
        for line in self._metrics.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                position = (record["epoch"], record.get("step", math.inf))
            except (ValueError, KeyError):
                continue  # a line that was cut off when the process was killed
            if position <= (epoch, step):
                kept.append(line + "\n")
        write_text(self._metrics, "".join(kept))

    def open_metrics(self) -> MetricsLog:
        """The log, to append to. Raises WriteError."""
        return MetricsLog(self._metrics)


class MetricsLog:
    """Appends JSON lines to a file, each of them flushed at once. A context manager closes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._failure(error) from None

    def write(self, record: dict[str, Any]) -> None:
        """Raises WriteError."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _failure(self, error: OSError) -> WriteError:
        return WriteError(f"{self._path}: cannot write ({error.strerror})")


def run_settings(config: TrainConfig) -> dict[str, int | float | str | bool]:
    """The settings that a model records, and that a resumed run must not change."""
    names = ("val_share", "min_count", "max_length", "seed", "select_by", "precision", "plain")
    return {name: getattr(config, name) for name in names} | asdict(config.recipe)


def data_identity(cache: FeatureCache) -> dict[str, str]:
    """What the features and captions of a cache follow from.

    Digests of the photos' names, the captions, the encoder's weights, the contents of the photo
    files and the status of the rows; and the rest of the encoder's record.
    """
    encoder = cache.encoder
    return {
        "photos": cache.photos_sha256,
        "captions": cache.captions_sha256,
        "weights": encoder.weights_sha256,
        "backbone": encoder.backbone,
        "feature_dim": str(encoder.feature_dim),
        "image_size": str(encoder.image_size),
        "views": ",".join(encoder.views),
        "preprocessing": encoder.preprocessing,
        "precision": encoder.precision,
        "tokenizer": cache.captions.tokenizer,
        "digests": _sha256(cache.digests),
        "status": _sha256(cache.status),
    }


def _sha256(array: NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


# Members of the identity whose values say nothing to a reader, and what is said instead.
_OTHER_DATA = {
    "photos": "photos",
    "captions": "captions",
    "tokenizer": "tokens (of another --tokenizer)",
    "weights": "weights of the backbone",
    "digests": "digests (contents of the photo files)",
    "status": "status of its photos (which of them are extracted)",
}


def check_resumable(checkpoint: Checkpoint, config: TrainConfig, data: dict[str, str]) -> None:
    """Raise TrainError if a run began with other settings or other data than are asked for.

    What an older checkpoint does not record is not compared.
    """
    asked = run_settings(config)
    for name, value in checkpoint.settings.items():
        if asked.get(name) != value and not _may_change(name, checkpoint, config.recipe):
            raise TrainError(
                f"{config.out}: was trained with {name} {value}, asked for {asked.get(name)}; "
                "give the options it began with, or another --out"
            )
    # Self-critical epochs, which follow a fixed number of others, count from that number.
    begun = min(checkpoint.epoch + bool(checkpoint.step), checkpoint.settings["epochs"])
    if config.recipe.epochs < begun:
        raise TrainError(
            f"{config.out}: has begun {begun} epochs, asked for {config.recipe.epochs}; "
            f"give --epochs {begun} or more, or another --out"
        )
    for name, value in data.items():
        before = checkpoint.data.get(name, value)
        if before != value:
            difference = (
                f"other {_OTHER_DATA[name]} than {config.from_cache} holds"
                if name in _OTHER_DATA
                else f"features of {name} {before}, {config.from_cache} holds {value}"
            )
            raise TrainError(
                f"{config.out}: was trained on {difference}; "
                "give the cache it began with, or another --out"
            )


def _may_change(name: str, checkpoint: Checkpoint, recipe: Recipe) -> bool:
    """Whether a resumed run may have another value for this setting."""
    if name == "select_by":
        return True
    if (checkpoint.epoch, checkpoint.step) > (checkpoint.settings["epochs"], 0):
        return False  # in the self-critical epochs, which follow a fixed number of others
    if name == "epochs":
        # More can be added as long as nothing in an epoch depends on their number.
        return recipe.decay == "constant" and not recipe.warmup and not recipe.scheduled_sampling
    return name.startswith("self_critical")
