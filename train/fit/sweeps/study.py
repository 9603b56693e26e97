"""The Optuna study of a sweep: the settings it searches, and the trials it remembers.

The study is the file `sweep.journal` in the sweep's folder. A repeated call continues it, and a
trial that was interrupted is tried again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.errors import CapError
from cache.record import EncoderRecord
from cache.store import FeatureCache
from train.config import FixedRecipe, SweepConfig, TrainConfig
from train.fit.data_recipe import fit_to_data
from train.model.bundle import BundleError, load_bundle, read_training

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

_NEVER_PRUNED = 4  # trials that are never stopped early, so that others can be compared with them
_BATCH_SIZES = (32, 64, 128, 256)
_MANY_CAPTIONS = 100_000
_TRIES = 2  # of a trial whose process died: another process may have taken the memory


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
        "batch_size": CategoricalDistribution(_BATCH_SIZES),
        "weight_decay": FloatDistribution(1e-3, 0.2, log=True),
        "label_smoothing": FloatDistribution(0.0, 0.2, step=0.05),
    }


def study_identity(
    config: SweepConfig, cache: FeatureCache, val_cache: FeatureCache | None
) -> dict[str, Any]:
    """What all trials of a sweep share, so that their scores can be compared.

    The caches are those of `config`. Digests are strings of 64 hexadecimal digits.
    """
    return {
        "epochs": config.epochs,
        "min_count": config.min_count,
        "seed": config.seed,
        **_encoder_identity(cache.encoder),
        "photos": cache.photos_sha256,
        "captions": cache.captions_sha256,
        "rows": _rows_sha256(cache),
        "val_cache": val_cache.photos_sha256 if val_cache else "",
        "val_captions": val_cache.captions_sha256 if val_cache else "",
        "val_rows": _rows_sha256(val_cache) if val_cache else "",
    }


def _encoder_identity(encoder: EncoderRecord) -> dict[str, Any]:
    """The encoder's record, without the name that the user gave the weights."""
    record = asdict(encoder) | {"views": ",".join(encoder.views)}
    record["weights"] = record.pop("weights_sha256")
    return record


def _rows_sha256(cache: FeatureCache) -> str:
    """Identifies the content of all rows: their status, photo digests and features."""
    digest = hashlib.sha256(cache.status.tobytes())
    digest.update(cache.checksums.tobytes())
    return digest.hexdigest()


def default_recipe(config: SweepConfig, cache: FeatureCache) -> FixedRecipe:
    """What `cap train` would train the cache with."""
    asked = TrainConfig(config.from_cache, config.out, val_cache=config.val_cache)
    return fit_to_data(asked, cache)[1]


@contextlib.contextmanager
def open_study(
    config: SweepConfig, identity: dict[str, Any], captions: int, default: FixedRecipe
) -> Iterator[Study]:
    """The study in the folder `config.out`, new or continued, locked against other processes.

    identity: as `study_identity` gives it. captions: as in `search_space`. default: the
    recipe of the first trial. Raises SweepError if
    the folder's study has another identity, is in use or cannot be written.
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
        recorded = _recorded_identity(config, study)
        for name, value in identity.items():
            if recorded.get(name, value) != value:
                raise SweepError(_difference(config, name, recorded[name], value))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant_liar is experimental
            # A continued sweep must not draw the same settings again.
            study.sampler = optuna.samplers.TPESampler(
                seed=config.seed + len(study.trials), constant_liar=True
            )
        study.pruner = optuna.pruners.MedianPruner(
            n_startup_trials=_NEVER_PRUNED, n_warmup_steps=max(1, config.epochs // 4)
        )
        for name in identity.keys() - study.user_attrs.keys():
            study.set_user_attr(name, identity[name])
        if not study.trials:
            space = search_space(captions)
            first = {name: getattr(default, name) for name in space}
            # Smaller batches than the space has are for little data.
            first["batch_size"] = max(first["batch_size"], min(_BATCH_SIZES))
            study.enqueue_trial(first)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            _enqueue_again(config, study, trial)
        yield study


def _recorded_identity(config: SweepConfig, study: Study) -> dict[str, Any]:
    """What the study says about itself. Version 0.1.0 recorded less: models of its trials tell."""
    recorded = dict(study.user_attrs)
    if "seed" not in recorded:
        for trial in study.get_trials(deepcopy=False):
            with contextlib.suppress(BundleError):
                model = load_bundle(trial_folder(config, trial.number))
                known = _encoder_identity(model.encoder) | recorded
                seed = model.training.get("config", {}).get("seed")
                return known if seed is None else known | {"seed": seed}
    return recorded


def _difference(config: SweepConfig, name: str, recorded: Any, found: Any) -> str:
    """The message about an entry of the identity that is not as recorded."""
    if name in ("epochs", "min_count", "seed"):
        option = f"--{name.replace('_', '-')}"
        began, now = f"with {option} {recorded}", f"asked for {option} {found}"
    elif name.startswith("val_") and not (recorded and found):
        began = "with --val-cache" if recorded else "without --val-cache"
        now = f"asked for {config.val_cache}" if found else "asked for none"
    else:
        validates = name.startswith("val_")
        cache = config.val_cache if validates else config.from_cache
        name = {"val_cache": "photos"}.get(name, name.removeprefix("val_"))
        digest = name in ("photos", "captions", "rows", "weights")
        began = f"with other {name}" if digest else f"with {name} {recorded}"
        now = f"than {cache} holds" if digest else f"{cache} has {found}"
        return (
            f"{config.out}: its sweep began {began}{' ' if digest else ', '}{now}; "
            "give the cache it began with, or name another --out"
        )
    return f"{config.out}: its sweep began {began}, {now}; give that again, or name another --out"


def _enqueue_again(config: SweepConfig, study: Study, trial: FrozenTrial) -> None:
    """End a trial that was cut off, and have its settings tried by a new trial."""
    from optuna.trial import TrialState

    settings = trial.params or trial.system_attrs.get("fixed_params", {})
    study.tell(trial.number, state=TrialState.FAIL)
    study.enqueue_trial(settings, user_attrs=trial.user_attrs)
    shutil.rmtree(trial_folder(config, trial.number), ignore_errors=True)


def retry(config: SweepConfig, study: Study, trial: Trial) -> bool:
    """Have the settings of a trial whose process died tried by a new trial, if they were not yet.

    Returns whether they are tried again.
    """
    tries = trial.user_attrs.get("tries", 1)
    if tries >= _TRIES:
        return False
    trial.set_user_attr("tries", tries + 1)
    _enqueue_again(config, study, study.get_trials(deepcopy=False)[trial.number])
    return True


def trial_folder(config: SweepConfig, number: int) -> Path:
    return config.out / f"trial-{number:03d}"


def ended_trials(study: Study) -> int:
    """How many trials need no second try: those that were trained, pruned, or failed themselves."""
    from optuna.trial import TrialState

    return sum(
        trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or "problem" in trial.user_attrs
        for trial in study.get_trials(deepcopy=False)
    )


def best_trial(config: SweepConfig, study: Study) -> tuple[FrozenTrial, float] | None:
    """The complete trial whose best.cap has the highest CIDEr, and that CIDEr.

    Of two equals the earlier trial is the better one. Trials whose model was deleted do not count.
    """
    from optuna.trial import TrialState

    # Not the trials' values: version 0.1.0 recorded the highest CIDEr of any epoch there.
    found = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        with contextlib.suppress(BundleError):
            training = read_training(trial_folder(config, trial.number) / "best.cap")
            cider = (training.get("scores") or {}).get("cider")
            if cider is not None:
                found.append((trial, float(cider)))
    return max(found, key=lambda one: (one[1], -one[0].number), default=None)
