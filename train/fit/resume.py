"""What a resumed run must have in common with the run that it continues."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, astuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache.store import DIGEST_BYTES, FeatureCache, open_cache
from train.captions.streaming.stream import FeatureStream
from train.captions.streaming.window import Layout
from train.config import FixedRecipe, TrainConfig
from train.fit.record.run_folder import Checkpoint, TrainError
from train.fit.run_data import LayoutOfEpoch
from train.fit.validation import ValidationPhotos


def run_settings(config: TrainConfig) -> dict[str, int | float | str | bool]:
    """The settings that a model records, and that a resumed run must not change.

    config: as `fit_to_data` gives it.
    """
    names = ("val_share", "max_length", "seed", "select_by", "precision", "plain")
    return {name: getattr(config, name) for name in names} | asdict(config.recipe)


def data_identity(cache: FeatureCache) -> dict[str, str]:
    """What the features and captions of a cache follow from.

    Digests of the photos' names, the captions, the encoder's weights, the contents of the photo
    files, the status of the rows and their checksums, which follow from the features; and the rest
    of the encoder's record.
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
        "checksums": _sha256(cache.checksums),
    }


def _sha256(array: NDArray[np.uint8] | NDArray[np.uint32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


# Members of the identity whose values say nothing to a reader, and what is said instead.
_OTHER_DATA = {
    "photos": "photos",
    "captions": "captions",
    "tokenizer": "tokens (of another --tokenizer)",
    "weights": "weights of the backbone",
    "digests": "digests (contents of the photo files)",
    "status": "status of its photos (which of them are extracted)",
    "checksums": "features of the same photos",
}

# Settings that earlier versions recorded, and their values that mean what is now always done.
_REMOVED = {"scheduled_sampling": 0.0}


def check_resumable(
    checkpoint: Checkpoint, config: TrainConfig, recipe: FixedRecipe, data: dict[str, str]
) -> None:
    """Raise TrainError if a run began with other settings or other data than are asked for.

    What an older checkpoint does not record is not compared.
    """
    asked = run_settings(config)
    for name, value in checkpoint.settings.items():
        if name in _REMOVED:
            if value == _REMOVED[name]:
                continue
            raise TrainError(
                f"{config.out}: was trained with {name} {value}, which no longer exists; begin "
                "again with --overwrite, or give another --out"
            )
        if asked.get(name) != value and not _may_change(name, checkpoint, config):
            raise TrainError(
                f"{config.out}: was trained with {name} {value}, asked for {asked.get(name)}; "
                "give the options it began with, or another --out"
            )
    # Self-critical epochs, which follow a fixed number of others, count from that number.
    begun = min(checkpoint.epoch + bool(checkpoint.step), checkpoint.settings["epochs"])
    if recipe.epochs < begun:
        raise TrainError(
            f"{config.out}: has begun {begun} epochs, asked for {recipe.epochs}; "
            f"give --epochs {begun} or more, or another --out"
        )
    for name, value in data.items():
        before = checkpoint.data.get(name, "" if name == "from_model" else value)
        if before != value:
            if name == "from_model":
                raise TrainError(
                    f"{config.out}: {_start_in_words(before)}, asked for "
                    f"{config.from_model or 'none'}; give the --from-model it began with, or "
                    "another --out"
                )
            difference = (
                f"other {_OTHER_DATA[name]} than {config.from_cache} holds"
                if name in _OTHER_DATA
                else f"features of {name} {before}, {config.from_cache} holds {value}"
            )
            raise TrainError(
                f"{config.out}: was trained on {difference}; "
                "give the cache it began with, or another --out"
            )


def _start_in_words(sha256: str) -> str:
    if not sha256:
        return "did not start from a model"
    return f"started from the model whose SHA-256 begins {sha256[:12]}"


def _may_change(name: str, checkpoint: Checkpoint, config: TrainConfig) -> bool:
    """Whether a resumed run may have another value for this setting."""
    if name in ("select_by", "patience_steps"):
        return True
    if name == "val_share":
        # Beside a --val-cache or --val-list it has no effect, then or now.
        of_its_own = checkpoint.validated_on.split()[0] != checkpoint.data["photos"]
        before = of_its_own or checkpoint.settings["val_share"] is None
        return before or config.val_share is None
    if (checkpoint.epoch, checkpoint.step) > (checkpoint.settings["epochs"], 0):
        return False  # in the self-critical epochs, which follow a fixed number of others
    if name == "epochs":
        # More can be added as long as nothing in an epoch depends on their number.
        recipe = config.recipe
        return recipe.decay == "constant" and not recipe.warmup
    return name.startswith("self_critical")


def window_tensor(stream: FeatureStream | None) -> Tensor:
    """What a checkpoint records of the order of an epoch; zeros if all features are in memory."""
    layout = None if stream is None else stream.layout
    return torch.tensor([0, 0, 0] if layout is None else astuple(layout))


def recorded_window(checkpoint: Checkpoint) -> LayoutOfEpoch:
    """How the epoch that was interrupted goes through its photos."""
    if checkpoint.photos is None or "window" not in checkpoint.photos:
        return LayoutOfEpoch(None)  # by a version without windows
    block, blocks, passes = checkpoint.photos["window"].tolist()
    return LayoutOfEpoch(Layout(block, blocks, passes) if block else None)


def resumed_photos(
    checkpoint: Checkpoint,
    config: TrainConfig,
    cache: FeatureCache,
    *,
    training: NDArray[np.bool_],
    validation: ValidationPhotos,
) -> tuple[NDArray[np.bool_], bool]:
    """((N,) which photos of the training cache any step has trained on, whether the validation
    photos are the same as before).

    training: (N,) the photos of an epoch from now on. Raises TrainError if photos that were trained
    on would validate, or if the epoch that was interrupted had other photos.
    """
    out, recorded = config.out, checkpoint.photos
    same = validation.is_recorded_as(checkpoint.validated_on)
    if recorded is None:  # by 0.1.0
        return training & bool(checkpoint.epoch or checkpoint.step), same
    trained_on, before = recorded["trained_on"].numpy(), recorded["training"].numpy()
    rows = validation.rows
    same = same and np.array_equal(recorded["validation"].numpy(), rows)
    leaked = 0 if same else _count_trained_on(config, cache, trained_on, rows)
    if leaked:
        own = config.val_cache or config.val_list
        name = "use those" if own else "give the --val-cache or --val-list"
        raise TrainError(
            f"{out}: {leaked:,} of the {len(rows):,} photos to validate on were trained on; "
            f"{name} it began with, or another --out"
        )
    if checkpoint.step and not np.array_equal(before, training):
        raise TrainError(
            f"{out}: was interrupted in an epoch over {before.sum():,} photos, asked for "
            f"{training.sum():,} others; validate on the photos it began with until the "
            "epoch ends, or name another --out"
        )
    return trained_on, same


def _count_trained_on(
    config: TrainConfig,
    cache: FeatureCache,
    trained_on: NDArray[np.bool_],
    rows: NDArray[np.int64],
) -> int:
    """How many validation photos have been trained on: the same photos, or copies of them.

    rows: theirs, in their own cache.
    """
    val_cache = cache if config.val_cache is None else open_cache(config.val_cache)
    if val_cache.photos_sha256 == cache.photos_sha256:
        leaked = trained_on[rows]
    else:
        leaked = np.zeros(len(rows), bool)
    digests = {digest.tobytes() for digest in cache.digests[trained_on]}
    digests.discard(bytes(DIGEST_BYTES))  # of files that could not be read
    copies = [digest.tobytes() in digests for digest in val_cache.digests[rows]]
    return int((leaked | np.array(copies, bool)).sum())
