"""The Optuna study of a sweep: the settings it searches, and the trials it remembers.

The study is the file `sweep.journal` in the sweep's folder. A repeated call continues it, and a
trial that was interrupted is tried again.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.errors import CapError
from train.config import BEST, SweepConfig

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

_NEVER_PRUNED = 4  # trials that are never stopped early, so that others can be compared with them
_MANY_CAPTIONS = 100_000


class SweepError(CapError):
    """Raised when a sweep cannot start or continue. The message is one line."""


def search_space(captions: int) -> dict[str, BaseDistribution]:
    """The recipe's settings that are searched, and their ranges. captions: in the cache."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    # A wide LSTM takes three times as long and pays off only with much data.
    hidden_sizes = (256, 512, 1024) if captions >= _MANY_CAPTIONS else (256, 512)
    return {
        "learning_rate": FloatDistribution(3e-4, 1e-2, log=True),
        "hidden_size": CategoricalDistribution(hidden_sizes),
        "embedding_size": CategoricalDistribution((128, 256, 512)),
        "dropout": FloatDistribution(0.0, 0.6, step=0.1),
        "batch_size": CategoricalDistribution((32, 64, 128, 256)),
        "weight_decay": FloatDistribution(1e-3, 0.2, log=True),
        "label_smoothing": FloatDistribution(0.0, 0.2, step=0.05),
    }


@contextlib.contextmanager
def open_study(config: SweepConfig, identity: dict[str, Any], captions: int) -> Iterator[Study]:
    """The study in the folder `config.out`, new or continued, locked against other processes.

    identity: what all trials of a sweep share. captions: as in `search_space`. Raises SweepError
    if the folder's study has another identity, is in use or cannot be written.
    """
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
            recorded = study.user_attrs.setdefault(name, value)
            if recorded != value:
                raise SweepError(
                    f"{config.out}: its sweep began with other {name}; name another --out"
                )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar is experimental
            # A continued sweep must not draw the same settings again.
            study.sampler = optuna.samplers.TPESampler(
                seed=config.seed + len(study.trials), constant_liar=True
            )
        study.pruner = optuna.pruners.MedianPruner(
            n_startup_trials=_NEVER_PRUNED, n_warmup_steps=max(1, config.epochs // 4)
        )
        if not study.trials:
            for name, value in identity.items():
                study.set_user_attr(name, value)
            study.enqueue_trial({name: getattr(BEST, name) for name in search_space(captions)})
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params or trial.system_attrs.get("fixed_params", {}))
            shutil.rmtree(trial_folder(config, trial.number), ignore_errors=True)
        yield study


def trial_folder(config: SweepConfig, number: int) -> Path:
    return config.out / f"trial-{number:03d}"


def ended_trials(study: Study) -> int:
    """How many trials need no second try: those that were trained, pruned, or failed themselves."""
    from optuna.trial import TrialState

    return sum(
        trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or "problem" in trial.user_attrs
        for trial in study.get_trials(deepcopy=False)
    )


def best_trial(study: Study) -> FrozenTrial | None:
    """The complete trial with the highest CIDEr, the earlier one of two equals."""
    from optuna.trial import TrialState

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return max(complete, key=lambda trial: (trial.value, -trial.number), default=None)
