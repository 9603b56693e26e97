"""Searching over training settings: many short runs, the hopeless ones stopped early.

Optuna proposes settings from the scores so far; processes of their own train them, each trial an
ordinary run folder `trial-000`, `trial-001` … below `out`. The study is the file `sweep.journal`
there: the same call goes on with it, and a trial that was interrupted is tried again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.errors import CapError
from cache.store import open_cache
from train.config import BEST, Recipe, SweepConfig, TrainConfig
from train.device import resolve_device
from train.fit.sweep_worker import EpochScore, Failed, Finished, work

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from optuna.study import Study
    from optuna.trial import Trial

_MOST_JOBS = 8  # unless asked for more: each takes memory for a model and its optimizer
_FIRST_JUDGED = 4  # trials that are never stopped: what the others are measured by
_MANY_CAPTIONS = 100_000
_NEVER = 10**9  # steps


class SweepError(CapError):
    """A sweep cannot start or go on. One line."""


@dataclass(frozen=True)
class TrialLog:
    """A trial that has ended."""

    number: int
    folder: Path
    state: str  # complete, stopped (hopeless) or failed
    cider: float | None  # of its best epoch, on the validation photos
    epochs: int  # done
    seconds: float
    settings: dict[str, Any]
    best: bool  # so far
    problem: str = ""

    def line(self) -> str:
        settings = " ".join(f"{name}={_short(value)}" for name, value in self.settings.items())
        score = "no score" if self.cider is None else f"CIDEr {100 * self.cider:.2f}"
        told = {"complete": "", "stopped": ", stopped early", "failed": f", {self.problem}"}
        best = " (best so far)" if self.best else ""
        return (
            f"trial {self.number}: {score}{best}{told[self.state]}, {self.epochs} epochs "
            f"in {self.seconds:.1f} s: {settings}"
        )


@dataclass(frozen=True)
class SweepResult:
    """The best trial of a sweep, and how many there are."""

    folder: Path
    cider: float
    settings: dict[str, Any]
    trials: int

    def options(self) -> str:
        """The settings as options of `cap train`."""
        return " ".join(
            f"--{name.replace('_', '-')} {_short(value)}" for name, value in self.settings.items()
        )

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def propose(trial: Trial, base: Recipe, captions: int) -> Recipe:
    """The search space: what is worth searching, around what usually works."""
    # A wide LSTM costs three times the time and pays only where there is much to learn.
    hidden_sizes = (256, 512, 1024) if captions >= _MANY_CAPTIONS else (256, 512)
    return replace(
        base,
        learning_rate=trial.suggest_float("learning_rate", 3e-4, 1e-2, log=True),
        hidden_size=trial.suggest_categorical("hidden_size", hidden_sizes),
        embedding_size=trial.suggest_categorical("embedding_size", (128, 256, 512)),
        dropout=trial.suggest_float("dropout", 0.0, 0.6, step=0.1),
        batch_size=trial.suggest_categorical("batch_size", (32, 64, 128, 256)),
        weight_decay=trial.suggest_float("weight_decay", 1e-3, 0.2, log=True),
        label_smoothing=trial.suggest_float("label_smoothing", 0.0, 0.2, step=0.05),
    )


_SEARCHED = (
    "learning_rate",
    "hidden_size",
    "embedding_size",
    "dropout",
    "batch_size",
    "weight_decay",
    "label_smoothing",
)


def sweep(config: SweepConfig) -> Iterator[TrialLog | SweepResult]:
    """Run trials until the folder has `config.trials`; yields each as it ends, then the best.

    The first trial has the default recipe, so the best is never worse than that. Raises SweepError,
    or CacheError and its like where no trial could run.
    """
    cache = open_cache(config.from_cache)
    identity = {
        "captions": cache.captions_sha256,
        "photos": cache.photos_sha256,
        "weights": cache.encoder.weights_sha256,
        "epochs": config.epochs,
        "min_count": config.min_count,
        "val_cache": open_cache(config.val_cache).photos_sha256 if config.val_cache else "",
    }
    device = resolve_device(config.device)
    cores = len(os.sched_getaffinity(0))
    jobs = config.jobs or (min(cores, _MOST_JOBS) if device.type == "cpu" else 1)
    with _opened_study(config, identity) as study:
        done = _ended(study)
        jobs = max(1, min(jobs, config.trials - done))
        if done < config.trials:
            with _workers(jobs, threads=max(1, cores // jobs)) as workers:
                yield from _run(config, study, workers, config.trials - done, len(cache.captions))
        yield _result(config, study)


def _run(
    config: SweepConfig, study: Study, workers: list[Connection], wanted: int, captions: int
) -> Iterator[TrialLog]:
    deadline = time.monotonic() + config.timeout_s if config.timeout_s is not None else None
    idle, running = list(workers), dict[Connection, _Running]()
    while True:
        while idle and wanted and (deadline is None or time.monotonic() < deadline):
            trial, pipe = study.ask(), idle.pop()
            recipe = propose(trial, replace(BEST, epochs=config.epochs), captions)
            running[pipe] = _Running(trial, recipe)
            pipe.send(_train_config(config, running[pipe]))
            wanted -= 1
        if not running:
            return
        ready = connection.wait(list(running))
        for pipe in [pipe for pipe in running if pipe in ready]:
            log = _hear(config, study, pipe, running[pipe])
            if log is not None:
                del running[pipe]
                idle.append(pipe)
                yield log


@dataclass
class _Running:
    trial: Trial
    recipe: Recipe
    cider: float | None = None  # best so far
    epochs: int = 0
    stopped: bool = False

    def __post_init__(self) -> None:
        self.since = time.perf_counter()


def _hear(
    config: SweepConfig, study: Study, pipe: Connection, running: _Running
) -> TrialLog | None:
    """Take one message of a worker; the trial's log if it has ended."""
    from optuna.trial import TrialState

    try:
        message = pipe.recv()
    except (EOFError, OSError):
        raise SweepError(
            f"{_folder(config, running.trial.number)}: its process died (out of memory? try "
            "--jobs 1); the same command goes on"
        ) from None
    trial, state = running.trial, "complete"
    match message:
        case EpochScore():
            running.epochs += 1
            running.cider = max(message.cider, running.cider or 0.0)
            trial.report(message.cider, running.epochs)
            running.stopped = trial.should_prune()
            pipe.send(not running.stopped)
            return None
        case Failed(every=True):
            raise SweepError(message.reason)
        case Failed():
            state = "failed"
            trial.set_user_attr("problem", message.reason)
            study.tell(trial, state=TrialState.FAIL)
        case Finished():
            state = "stopped" if running.stopped else "complete"
            if running.stopped:
                study.tell(trial, state=TrialState.PRUNED)
            else:
                study.tell(trial, running.cider)
    best = _best(study)
    return TrialLog(
        number=trial.number,
        folder=_folder(config, trial.number),
        state=state,
        cider=running.cider,
        epochs=running.epochs,
        seconds=time.perf_counter() - running.since,
        settings=_searched(running.recipe),
        best=best is not None and best.number == trial.number,
        problem=message.reason if isinstance(message, Failed) else "",
    )


def _searched(recipe: Recipe) -> dict[str, Any]:
    return {name: getattr(recipe, name) for name in _SEARCHED}


def _folder(config: SweepConfig, number: int) -> Path:
    return config.out / f"trial-{number:03d}"


def _train_config(config: SweepConfig, running: _Running) -> TrainConfig:
    return TrainConfig(
        from_cache=config.from_cache,
        out=_folder(config, running.trial.number),
        recipe=running.recipe,
        val_cache=config.val_cache,
        min_count=config.min_count,
        seed=config.seed,
        save_every=_NEVER,
        device=config.device,
        overwrite=True,
    )


@contextlib.contextmanager
def _opened_study(config: SweepConfig, identity: dict[str, Any]) -> Iterator[Study]:
    """The study in the folder, new or gone on with; nobody else may have it open."""
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
        from optuna.trial import TrialState
    except ImportError:
        raise SweepError(
            "cap sweep needs Optuna; get it with `pip install 'optuna>=4.2'`"
        ) from None
    journal = config.out / "sweep.journal"
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        lock = journal.open("ab")
    except OSError as error:
        raise SweepError(f"{config.out}: cannot write there ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SweepError(f"{config.out}: another sweep is running in it") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage = JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(
            storage=storage, study_name="sweep", direction="maximize", load_if_exists=True
        )
        for name, value in identity.items():
            begun = study.user_attrs.setdefault(name, value)
            if begun != value:
                raise SweepError(
                    f"{config.out}: its sweep was begun with other {name}; name another --out"
                )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar is experimental
            # Going on must not draw again what was drawn before.
            study.sampler = optuna.samplers.TPESampler(
                seed=config.seed + len(study.trials), constant_liar=True
            )
        study.pruner = optuna.pruners.MedianPruner(
            n_startup_trials=_FIRST_JUDGED, n_warmup_steps=max(1, config.epochs // 4)
        )
        if not study.trials:
            for name, value in identity.items():
                study.set_user_attr(name, value)
            study.enqueue_trial(_searched(BEST))
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params or trial.system_attrs.get("fixed_params", {}))
            shutil.rmtree(_folder(config, trial.number), ignore_errors=True)
        yield study


def _ended(study: Study) -> int:
    """Trials that need no second try: those that came to an end, even a bad one."""
    from optuna.trial import TrialState

    return sum(
        trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or "problem" in trial.user_attrs
        for trial in study.get_trials(deepcopy=False)
    )


def _best(study: Study) -> Any:
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max(complete, key=lambda trial: (trial.value, -trial.number), default=None)


def _result(config: SweepConfig, study: Study) -> SweepResult:
    best = _best(study)
    if best is None:
        problems = [t.user_attrs["problem"] for t in study.trials if "problem" in t.user_attrs]
        reason = problems[-1] if problems else "no trial has finished; give it more time"
        raise SweepError(f"{config.out}: no result yet ({reason})")
    settings = {**best.params, "epochs": config.epochs}
    return SweepResult(_folder(config, best.number), float(best.value), settings, _ended(study))


@contextlib.contextmanager
def _workers(count: int, threads: int) -> Iterator[list[Connection]]:
    """Processes that train what they are sent; stopped at once on leaving."""
    context = get_context("spawn")  # a fork would share the state of torch's threads
    pipes: list[Connection] = []
    processes: list[SpawnProcess] = []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, threads), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        yield pipes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
