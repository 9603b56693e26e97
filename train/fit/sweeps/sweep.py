"""Searching over training settings with many short runs, the hopeless ones stopped early.

Optuna proposes settings from the scores so far, and worker processes train them. Each trial is an
ordinary run folder below `out`: `trial-000`, `trial-001` and so on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, Self

from cache.share import share
from cache.store import open_cache
from train.config import BEST, SweepConfig, TrainConfig
from train.device import resolve_device
from train.fit.reports import SweepNotice, SweepResult, TrialLog
from train.fit.sweeps.study import (
    SweepError,
    best_trial,
    default_recipe,
    ended_trials,
    open_study,
    retry,
    search_space,
    study_identity,
    trial_folder,
)
from train.fit.sweeps.worker import EpochScore, Failed, Finished, Worker

if TYPE_CHECKING:
    import torch
    from optuna.study import Study
    from optuna.trial import Trial

_MOST_JOBS = 8  # by default: each takes memory for a model and its optimizer


def sweep(config: SweepConfig) -> Iterator[SweepNotice | TrialLog | SweepResult]:
    """Run trials until the folder has `config.trials`. Yields each as it ends, then the best one.
    A notice about the photos comes before, if there is one.

    The first trial has the default recipe, so the best is at least as good. Raises SweepError, or
    another CapError, such as CacheError, if no trial could run.
    """
    cache = open_cache(config.from_cache)
    val_cache = open_cache(config.val_cache) if config.val_cache else None
    default = default_recipe(config, cache)
    config = replace(config, min_count=config.min_count or default.min_count)
    identity = study_identity(config, cache, val_cache)
    captions = len(cache.captions)
    device = resolve_device(config.device)
    cores = share().cores
    jobs = config.jobs or (min(cores, _MOST_JOBS) if device.type == "cpu" else 1)
    with open_study(config, identity, captions, default) as study:
        missing = config.trials - ended_trials(study)
        jobs = max(1, min(jobs, missing))
        if missing > 0:
            with _Workers(max(1, cores // jobs), device) as workers:
                yield from _run_trials(config, study, workers, jobs, missing, captions)
        yield _result(config, study)


def _run_trials(
    config: SweepConfig, study: Study, workers: _Workers, jobs: int, count: int, captions: int
) -> Iterator[SweepNotice | TrialLog]:
    """Run `count` trials, `jobs` at a time. captions: as in `search_space`."""
    deadline = time.monotonic() + config.timeout_s if config.timeout_s is not None else math.inf
    running: list[_RunningTrial] = []
    noticed = False
    while True:
        while len(running) < jobs and count and time.monotonic() < deadline:
            trial = study.ask(search_space(captions))
            for name, value in workers.circumstances.items():
                trial.set_user_attr(name, value)
            worker = workers.take()
            running.append(_RunningTrial(trial, worker))
            worker.send(_train_config(config, trial))
            count -= 1
        if not running:
            return
        ready = connection.wait([one.worker.pipe for one in running])
        for one in [one for one in running if one.worker.pipe in ready]:
            log = _receive(config, study, one)
            if one.notice is not None and not noticed:  # all trials have the same photos
                noticed = True
                yield one.notice
            if log is None:
                continue
            running.remove(one)
            count += log.state == "lost"  # a new trial takes its place
            workers.take_back(one.worker, died=one.worker_died)
            yield log


@dataclass(eq=False)
class _RunningTrial:
    trial: Trial
    worker: Worker
    cider: float | None = None  # of its best.cap so far
    epochs: int = 0
    stopped: bool = False
    worker_died: bool = False
    notice: SweepNotice | None = None
    started_at: float = field(default_factory=time.perf_counter)


def _receive(config: SweepConfig, study: Study, running: _RunningTrial) -> TrialLog | None:
    """Handle one message from a worker. Returns the trial's log if the trial has ended."""
    from optuna.trial import TrialState

    trial = running.trial
    try:
        message = running.worker.pipe.recv()
    except (EOFError, OSError):
        message = None
    state, problem = "complete", ""
    match message:
        case SweepNotice():
            running.notice = message
            return None
        case EpochScore():
            running.epochs += 1
            if message.best:
                running.cider = message.cider
            trial.report(message.cider, running.epochs)
            running.stopped = trial.should_prune()
            running.worker.send(not running.stopped)
            return None
        case Failed(in_every_trial=True):
            raise SweepError(message.reason)
        case Failed():
            state, problem = "failed", message.reason
        case Finished() if running.stopped:
            state = "stopped"
            study.tell(trial, state=TrialState.PRUNED)
        case Finished():
            study.tell(trial, running.cider)
        case _:
            running.worker_died = True
            problem = f"its process {running.worker.end()} (out of memory? try --jobs 1)"
            state = "lost" if retry(config, study, trial) else "failed"
    if state == "failed":
        trial.set_user_attr("problem", problem)
        study.tell(trial, state=TrialState.FAIL)
    best = best_trial(config, study)
    return TrialLog(
        number=trial.number,
        folder=trial_folder(config, trial.number),
        state=state,
        cider=None if state == "lost" else running.cider,
        epochs=running.epochs,
        seconds=time.perf_counter() - running.started_at,
        settings=trial.params,
        best=best is not None and best[0].number == trial.number,
        problem=problem,
    )


# The settings that a sweep passes on to its trials as they are.
_SHARED = [
    each.name
    for each in fields(SweepConfig)
    if each.name in {other.name for other in fields(TrainConfig)} - {"out"}
]


def _train_config(config: SweepConfig, trial: Trial) -> TrainConfig:
    return TrainConfig(
        **{name: getattr(config, name) for name in _SHARED},
        out=trial_folder(config, trial.number),
        recipe=replace(BEST, epochs=config.epochs, min_count=config.min_count, **trial.params),
        overwrite=True,
    )


def _result(config: SweepConfig, study: Study) -> SweepResult:
    from optuna.trial import TrialState

    best = best_trial(config, study)
    if best is None:
        problems = [t.user_attrs["problem"] for t in study.trials if "problem" in t.user_attrs]
        reason = problems[-1] if problems else "no trial has finished; give it more time"
        if study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            reason = "the best.cap of every finished trial is gone; raise --trials"
        raise SweepError(f"{config.out}: no result yet ({reason})")
    trial, cider = best
    # A sweep that goes on may have another device; what the trial was trained on counts.
    shared = {name: getattr(config, name) for name in _SHARED}
    shared["device"] = trial.user_attrs.get("device", config.device)
    settings: dict[str, Any] = {
        **shared,
        "epochs": config.epochs,
        "min_count": config.min_count,
        **trial.params,
    }
    return SweepResult(
        folder=trial_folder(config, trial.number),
        cider=cider,
        settings={name: value for name, value in settings.items() if value is not None},
        trials=ended_trials(study),
        threads=trial.user_attrs.get("threads"),
    )


class _Workers:
    """The processes that train. They start when they are needed and end on leaving the context."""

    def __init__(self, threads: int, device: torch.device) -> None:
        """threads: of each process."""
        self._threads = threads
        self._all: list[Worker] = []
        self._idle: list[Worker] = []
        # What a trial's weights depend on beside its settings. On a GPU the threads do not matter.
        self.circumstances: dict[str, str | int] = {"device": str(device)}
        if device.type == "cpu":
            self.circumstances["threads"] = threads

    def take(self) -> Worker:
        """A process that has nothing to do, or a new one."""
        if self._idle:
            return self._idle.pop()
        worker = Worker(self._threads)
        self._all.append(worker)
        return worker

    def take_back(self, worker: Worker, *, died: bool) -> None:
        """Take back the process of a trial that has ended."""
        (self._all.remove if died else self._idle.append)(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.terminate()
        for worker in self._all:
            worker.end()
