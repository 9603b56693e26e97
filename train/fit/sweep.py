"""Searching over training settings with many short runs, the hopeless ones stopped early.

Optuna proposes settings from the scores so far, and worker processes train them. Each trial is an
ordinary run folder below `out`: `trial-000`, `trial-001` and so on.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from cache.store import open_cache
from train.config import BEST, SweepConfig, TrainConfig
from train.device import resolve_device
from train.fit.reports import SweepResult, TrialLog
from train.fit.run_folder import data_identity
from train.fit.sweep_study import (
    SweepError,
    best_trial,
    ended_trials,
    open_study,
    search_space,
    trial_folder,
)
from train.fit.sweep_worker import EpochScore, Failed, Finished, work

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from optuna.study import Study
    from optuna.trial import Trial

_MOST_JOBS = 8  # by default: each takes memory for a model and its optimizer
_NEVER = 10**9  # steps


def sweep(config: SweepConfig) -> Iterator[TrialLog | SweepResult]:
    """Run trials until the folder has `config.trials`. Yields each as it ends, then the best one.

    The first trial has the default recipe, so the best is at least as good. Raises SweepError, or
    another CapError, such as CacheError, if no trial could run.
    """
    cache = open_cache(config.from_cache)
    identity = data_identity(cache) | {
        "epochs": config.epochs,
        "min_count": config.min_count,
        "val_cache": open_cache(config.val_cache).photos_sha256 if config.val_cache else "",
    }
    captions = len(cache.captions)
    device = resolve_device(config.device)
    cores = len(os.sched_getaffinity(0))
    jobs = config.jobs or (min(cores, _MOST_JOBS) if device.type == "cpu" else 1)
    with open_study(config, identity, captions) as study:
        missing = config.trials - ended_trials(study)
        jobs = max(1, min(jobs, missing))
        if missing > 0:
            with _start_workers(jobs, threads=max(1, cores // jobs)) as workers:
                yield from _run_trials(config, study, workers, missing, captions)
        yield _result(config, study)


def _run_trials(
    config: SweepConfig, study: Study, workers: list[Connection], count: int, captions: int
) -> Iterator[TrialLog]:
    deadline = time.monotonic() + config.timeout_s if config.timeout_s is not None else None
    idle, running = list(workers), dict[Connection, _RunningTrial]()
    while True:
        while idle and count and (deadline is None or time.monotonic() < deadline):
            trial, worker = study.ask(search_space(captions)), idle.pop()
            running[worker] = _RunningTrial(trial)
            worker.send(_train_config(config, trial))
            count -= 1
        if not running:
            return
        ready = connection.wait(list(running))
        for worker in [worker for worker in running if worker in ready]:
            log = _receive(config, study, worker, running[worker])
            if log is not None:
                del running[worker]
                idle.append(worker)
                yield log


@dataclass
class _RunningTrial:
    trial: Trial
    cider: float | None = None  # best so far
    epochs: int = 0
    stopped: bool = False
    started_at: float = field(default_factory=time.perf_counter)


def _receive(
    config: SweepConfig, study: Study, worker: Connection, running: _RunningTrial
) -> TrialLog | None:
    """Handle one message from a worker. Returns the trial's log if the trial has ended."""
    from optuna.trial import TrialState

    trial = running.trial
    try:
        message = worker.recv()
    except (EOFError, OSError):
        raise SweepError(
            f"{trial_folder(config, trial.number)}: its process died (out of memory? try "
            "--jobs 1); run the same command again to continue"
        ) from None
    state, problem = "complete", ""
    match message:
        case EpochScore():
            running.epochs += 1
            running.cider = max(message.cider, running.cider or 0.0)
            trial.report(message.cider, running.epochs)
            running.stopped = trial.should_prune()
            worker.send(not running.stopped)
            return None
        case Failed(in_every_trial=True):
            raise SweepError(message.reason)
        case Failed():
            state, problem = "failed", message.reason
            trial.set_user_attr("problem", problem)
            study.tell(trial, state=TrialState.FAIL)
        case Finished() if running.stopped:
            state = "stopped"
            study.tell(trial, state=TrialState.PRUNED)
        case Finished():
            study.tell(trial, running.cider)
    best = best_trial(study)
    return TrialLog(
        number=trial.number,
        folder=trial_folder(config, trial.number),
        state=state,
        cider=running.cider,
        epochs=running.epochs,
        seconds=time.perf_counter() - running.started_at,
        settings=trial.params,
        best=best is not None and best.number == trial.number,
        problem=problem,
    )


def _train_config(config: SweepConfig, trial: Trial) -> TrainConfig:
    return TrainConfig(
        from_cache=config.from_cache,
        out=trial_folder(config, trial.number),
        recipe=replace(BEST, epochs=config.epochs, **trial.params),
        val_cache=config.val_cache,
        min_count=config.min_count,
        seed=config.seed,
        save_every=_NEVER,
        device=config.device,
        overwrite=True,
    )


def _result(config: SweepConfig, study: Study) -> SweepResult:
    best = best_trial(study)
    if best is None:
        problems = [t.user_attrs["problem"] for t in study.trials if "problem" in t.user_attrs]
        reason = problems[-1] if problems else "no trial has finished; give it more time"
        raise SweepError(f"{config.out}: no result yet ({reason})")
    assert best.value is not None
    settings = {**best.params, "epochs": config.epochs}
    return SweepResult(trial_folder(config, best.number), best.value, settings, ended_trials(study))


@contextlib.contextmanager
def _start_workers(count: int, threads: int) -> Iterator[list[Connection]]:
    """Processes that train what they are sent, by their pipes. They are stopped on leaving."""
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
