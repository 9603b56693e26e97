"""What a run trains on and what it validates on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from cache.create import size_text
from cache.record import CacheError
from cache.store import DONE, FeatureCache, open_cache
from cache.verify import check_rows
from train.captions.caption_set import (
    CaptionSet,
    TrainingSetError,
    begin_upload,
    caption_set,
    captioned_photos,
)
from train.captions.photo_split import (
    count_copies,
    count_copies_of,
    may_be_equal,
    split_by_list,
    split_photos,
)
from train.captions.streaming.held import HeldFeatures, hold
from train.captions.streaming.memory import FeatureMemory, feature_memory
from train.captions.streaming.stream import FeatureStream
from train.captions.streaming.window import (
    Layout,
    least_photos_in_memory,
    most_moved,
    window_layout,
)
from train.captions.vocabulary import Vocabulary, build_vocabulary, usual_length
from train.config import FixedRecipe, TrainConfig, WindowSize
from train.fit.record.run_folder import TrainError
from train.fit.validation import ValidationPhotos
from train.model.start_model import StartModel


@dataclass(frozen=True)
class LayoutOfEpoch:
    """How the epoch that was interrupted goes through its photos. None: all are in memory."""

    layout: Layout | None


@dataclass(frozen=True)
class RunData:
    """What a run trains on and validates on."""

    vocabulary: Vocabulary
    training_captions: CaptionSet
    validation_captions: CaptionSet
    validation_photos: ValidationPhotos  # with their references
    memory: FeatureMemory  # for the features of the training photos
    copies: int  # photos, of those that are split, that are copies of another one
    val_photos_trained_on: int  # validation photos that are copies of training photos


def load_run_data(
    config: TrainConfig,
    recipe: FixedRecipe,
    cache: FeatureCache,
    device: torch.device,
    rules: int,
    start: StartModel | None = None,
    window: LayoutOfEpoch | None = None,
) -> RunData:
    """Choose the photos, count the words and number the captions.

    Validation photos come from a cache of their own, or are listed or held out of the training
    cache. config, recipe: as `fit_to_data` gives them. rules: as `DATA_RULES`. start: the model
    that training starts from, whose words are kept. window: of the interrupted epoch that training
    goes on with, which fixes the order of its photos. Raises CacheError, TrainError,
    TrainingSetError, SplitError or VocabularyError.
    """
    memory = feature_memory(WindowSize.parse(config.window), cache, device)
    if window is not None:
        memory = _as_before(config, window, memory)
    resident = memory.size_bytes is None
    copies, features = 0, begin_upload(cache, device) if resident else None
    if config.val_cache is not None:
        val_cache = open_cache(config.val_cache)
        _check_val_cache(val_cache, cache, may_be_the_same=rules == 1)
        training_rows, validation_rows = cache.rows_with(DONE), None
    else:
        val_cache = cache
        if config.val_list is not None:
            training_rows, validation_rows = split_by_list(cache, config.val_list)
        else:
            assert config.val_share is not None
            training_rows, validation_rows = split_photos(
                cache, held_out=config.val_share, seed=config.seed, split_copies=rules == 1
            )
        if rules > 1:
            copies = count_copies(cache.digests[np.union1d(training_rows, validation_rows)])
        if len(training_rows) and not len(validation_rows):
            photos = (
                "only one photo has captions"
                if len(training_rows) == 1
                else f"the {len(training_rows):,} photos with captions are copies of one"
            )
            raise TrainError(
                f"{config.from_cache}: {photos}, so none can be held out; use --val-cache"
            )
    length = config.max_length
    if rules > 1:
        length = max(length, usual_length(cache.captions, training_rows))
    vocabulary = (
        build_vocabulary(cache.captions, recipe.min_count)
        if rules == 1
        else build_vocabulary(
            cache.captions, recipe.min_count, rows=training_rows, max_length=length
        )
    )
    if start is not None:
        vocabulary = start.vocabulary(vocabulary)
    try:
        training = caption_set(
            cache,
            vocabulary,
            rows=training_rows,
            device=device,
            max_length=length,
            features_from=features
            if resident
            else _stream(cache, training_rows, recipe, device, memory, window),
        )
        validation = caption_set(
            val_cache,
            vocabulary,
            rows=validation_rows,
            device=device,
            max_length=length,
            features_from=_validation_features(
                val_cache, validation_rows, training, device, shared=val_cache is cache
            ),
        )
    except torch.OutOfMemoryError:
        size = cache.features.nbytes + (0 if val_cache is cache else val_cache.features.nbytes)
        if memory.size_bytes is not None:
            size = memory.size_bytes
        raise TrainError(
            f"{device}: no memory for {size / 1e9:.1f} GB of features; use a smaller --window, or "
            "--device cpu"
        ) from None
    if training.stream is not None:  # which checks rows when it reads them
        check_rows(val_cache, validation.feature_rows)
    elif val_cache is cache:  # together, because neighbouring rows are read at once
        check_rows(cache, np.concatenate([training.feature_rows, validation.feature_rows]))
    else:
        check_rows(cache, training.feature_rows)
        check_rows(val_cache, validation.feature_rows)
    validation_photos = ValidationPhotos(val_cache, rows=validation_rows)
    trained_on = cache.digests[np.unique(training.feature_rows)]
    return RunData(
        vocabulary=vocabulary,
        training_captions=training,
        validation_captions=validation,
        validation_photos=validation_photos,
        copies=copies,
        memory=memory,
        val_photos_trained_on=count_copies_of(
            trained_on, val_cache.digests[validation_photos.rows]
        ),
    )


def with_settled_window(
    config: TrainConfig, cache: FeatureCache, device: torch.device
) -> TrainConfig:
    """The settings with a `--window` that means the same to every process that trains with this
    one, whatever memory is free where it runs.
    """
    memory = feature_memory(WindowSize.parse(config.window), cache, device)
    size = "all" if memory.size_bytes is None else f"{memory.size_bytes}B"
    return replace(config, window=size)


def _as_before(config: TrainConfig, window: LayoutOfEpoch, memory: FeatureMemory) -> FeatureMemory:
    """The memory for an epoch that was interrupted, whose order depends on it."""
    if config.window != "auto" and (memory.size_bytes is None) != (window.layout is None):
        how = "all features in memory" if window.layout is None else "a window of the features"
        raise TrainError(
            f"{config.out}: was interrupted in an epoch with {how}; leave out --window until the "
            "epoch ends, or name another --out"
        )
    if window.layout is None:
        return FeatureMemory(None)
    return FeatureMemory(memory.size_bytes or 0, "streamed as the interrupted epoch began")


def _stream(
    cache: FeatureCache,
    rows: NDArray[np.int64],
    recipe: FixedRecipe,
    device: torch.device,
    memory: FeatureMemory,
    window: LayoutOfEpoch | None,
) -> FeatureStream:
    """What streams the features of the training photos. Raises TrainError if memory is too small
    for a batch.
    """
    photos, captions = captioned_photos(cache, rows)
    photo_bytes = cache.features[:1].nbytes
    batch = recipe.batch_size
    if recipe.self_critical_epochs:
        batch = max(batch, recipe.self_critical_photos)
    if window is not None and window.layout is not None:
        layout: Layout | None = window.layout
    else:
        assert memory.size_bytes is not None
        layout = window_layout(memory.size_bytes // photo_bytes, photo_bytes, captions, batch)
    if layout is None:
        least = least_photos_in_memory(captions, batch)
        raise TrainError(
            f"--window: batches of {batch:,} need {size_text(least * photo_bytes)}, for {least:,} "
            "photos; name more, or lower --batch-size"
        )
    moved = most_moved(captions, recipe.batch_size, layout.passes)
    if recipe.self_critical_epochs:  # whose items are photos
        moved = max(moved, most_moved(np.ones_like(captions), recipe.self_critical_photos))
    return FeatureStream(cache, photos, layout, moved, device)


def _validation_features(
    val_cache: FeatureCache,
    rows: NDArray[np.int64] | None,
    training: CaptionSet,
    device: torch.device,
    *,
    shared: bool,
) -> CaptionSet | HeldFeatures | None:
    """Where validation takes its features from; None: from its cache, as a whole."""
    if training.stream is None:
        return training if shared else None
    if device.type == "cpu" and val_cache.shards is None:
        return None  # mapped
    return hold(val_cache, captioned_photos(val_cache, rows)[0], device)


def _check_val_cache(
    val_cache: FeatureCache, cache: FeatureCache, *, may_be_the_same: bool
) -> None:
    """Raise CacheError or TrainingSetError if a cache cannot validate training on another one."""
    difference = val_cache.encoder.difference(cache.encoder)
    if difference is not None:
        raise CacheError(f"{val_cache.path}: made with {difference} as in {cache.path}")
    difference = val_cache.captions.other_tokenizer(cache.captions)
    if difference is not None:
        raise CacheError(f"{val_cache.path}: made with {difference} as in {cache.path}")
    is_the_same = (
        val_cache.photos_sha256 == cache.photos_sha256
        and val_cache.captions_sha256 == cache.captions_sha256
        and may_be_equal(val_cache.digests, cache.digests)
    )
    if is_the_same and not may_be_the_same:
        raise TrainingSetError(
            f"{val_cache.path}: holds the photos and captions that are trained on; leave out "
            "--val-cache to hold some of them out, or name a cache of other photos"
        )
