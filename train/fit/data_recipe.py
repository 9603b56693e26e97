"""What a recipe leaves to the data: length of training, batches, vocabulary, photos held out.

All bounds are here. They were found with 50 to 6,000 photos of Flickr8k (`scripts/by_size.py`).

A count of epochs means little by itself: 20 epochs are 40 steps for 50 photos and 65,000 for COCO.
So training goes on until validation photos show no gain, but not beyond a number of epochs that
falls with their length.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cache.store import DONE, FeatureCache
from train.config import FixedRecipe, Recipe, TrainConfig

# An epoch has this many steps or more, as long as batches are not smaller than the smallest.
_EPOCH_STEPS = 32
_SMALLEST_BATCH, _LARGEST_BATCH = 16, 128
# The most that is trained: this many steps, or this many epochs if they have more steps.
_MOST_STEPS, _MOST_EPOCHS = 1500, 20
# Without a better model in as many steps as the larger of the two, training ends.
_PATIENCE_STEPS = 250
_PATIENCE_EPOCHS = 5
# (fewer captions than this, minimum count): in few captions a word seen once is better than <unk>.
_MIN_COUNTS = ((1_000, 1), (5_000, 2), (20_000, 3))
_LARGEST_MIN_COUNT = 4
# Photos held out for validation: this share, but at least so many, and then at most a fifth.
_HELD_OUT_SHARE, _HELD_OUT_PHOTOS, _LARGEST_HELD_OUT_SHARE = 0.05, 25, 0.2

# Fifty photos of COCO improved a model of Flickr8k at a quarter of the usual rate alone.
_LEARNING_RATE, _RATE_FROM_MODEL = 0.002, 0.0005
# Fewer captions than these teach a model the commonest sentences and little of what is to be seen.
FEW_CAPTIONS = 1_000

# The fields that a recipe may leave open.
_OPEN = ("epochs", "batch_size", "min_count", "learning_rate")


def fit_to_data(
    config: TrainConfig, cache: FeatureCache, recorded: Mapping[str, Any] | None = None
) -> tuple[TrainConfig, FixedRecipe]:
    """The settings with every number that they leave to the data, and their recipe.

    recorded: the settings of a run that is resumed, which has chosen these numbers already.
    """
    rows = cache.captions.rows[cache.status[cache.captions.rows] == DONE]
    share = config.val_share
    if share is None and config.val_cache is None and config.val_list is None:
        share = (recorded and recorded["val_share"]) or held_out_share(len(np.unique(rows)))
    recipe = data_recipe(
        config.recipe,
        round((1 - (share or 0.0)) * len(rows)),
        recorded,
        from_model=config.from_model is not None,
    )
    if config.patience is not None:
        recipe = dataclasses.replace(recipe, patience_steps=None)
    return dataclasses.replace(config, recipe=recipe, val_share=share), recipe


def data_recipe(
    recipe: Recipe,
    captions: int,
    recorded: Mapping[str, Any] | None = None,
    *,
    from_model: bool = False,
) -> FixedRecipe:
    """The recipe with every number that it leaves to the data.

    captions: number of training captions. recorded: the settings of a run that is resumed, which
    has chosen these numbers already. from_model: whether training starts from a trained model.
    """
    if isinstance(recipe, FixedRecipe):
        return recipe
    chosen = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    if recorded is not None:
        if recipe.epochs is None:
            chosen["patience_steps"] = recorded.get("patience_steps")
        chosen.update({name: recorded[name] for name in _OPEN if chosen[name] is None})
        return FixedRecipe(**chosen)
    if recipe.batch_size is None:
        chosen["batch_size"] = _batch_size(captions)
    if recipe.learning_rate is None:
        chosen["learning_rate"] = _RATE_FROM_MODEL if from_model else _LEARNING_RATE
    if recipe.min_count is None:
        chosen["min_count"] = next(
            (count for most, count in _MIN_COUNTS if captions < most), _LARGEST_MIN_COUNT
        )
    if recipe.epochs is None:
        steps = max(1, math.ceil(captions / chosen["batch_size"]))
        chosen["epochs"] = max(_MOST_EPOCHS, math.ceil(_MOST_STEPS / steps))
        chosen["patience_steps"] = max(_PATIENCE_STEPS, _PATIENCE_EPOCHS * steps)
    return FixedRecipe(**chosen)


def _batch_size(captions: int) -> int:
    """The largest power of two that gives an epoch its steps, within bounds."""
    power = 1 << max(captions // _EPOCH_STEPS, 1).bit_length() - 1
    return min(max(power, _SMALLEST_BATCH), _LARGEST_BATCH)


def held_out_share(photos: int) -> float:
    """The share of the photos with captions to hold out for validation."""
    fewest = min(_HELD_OUT_PHOTOS / max(photos, 1), _LARGEST_HELD_OUT_SHARE)
    return max(_HELD_OUT_SHARE, fewest)
