"""Captions of the photos in a cache, from their features."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from cache.store import DONE, FeatureCache
from pipeline.captioner.predictions import CaptionError, Prediction, prediction_of
from train.captions.views import chosen_view, view_features
from train.config import SearchConfig
from train.model.bundle import Bundle
from train.search.hypotheses import search_several

_CACHE_ROWS = 256  # how many rows of a cache are captioned at once


def caption_cache(
    bundle: Bundle,
    cache: FeatureCache,
    search_config: SearchConfig,
    *,
    rows: NDArray[np.int64] | None = None,
    report: Callable[[int, int], None] | None = None,
    others: int = 0,
) -> dict[str, Prediction]:
    """Captions for photos of a cache, by image id. Reads no photo file.

    rows: of the photos, ascending; None for all that were extracted. report: is told how many
    photos of how many are done. others: as for `search_several`. Raises SearchError, ViewError or
    CaptionError (a photo gets no caption).
    """
    search_config = search_config.up_to(bundle.vocabulary.longest)
    view = chosen_view(search_config.view, cache.encoder.views, bundle.training)
    device = next(bundle.decoder.parameters()).device
    predictions = {}
    wanted = cache.rows_with(DONE) if rows is None else rows
    for start in range(0, len(wanted), _CACHE_ROWS):
        chosen = wanted[start : start + _CACHE_ROWS]
        found = search_several(
            bundle.decoder,
            view_features(cache, chosen, view).to(device),
            search_config,
            numbers=chosen.tolist(),
            others=others,
        )
        for row, hypotheses in zip(chosen.tolist(), found, strict=True):
            prediction = prediction_of(
                cache.paths[row], bundle.vocabulary, hypotheses, search_config.captions
            )
            if prediction.error:
                raise CaptionError(
                    f"{cache.path}: no caption for {prediction.path} ({prediction.error}); "
                    "use another model"
                )
            predictions[cache.image_ids[row]] = prediction
        if report is not None:
            report(len(predictions), len(wanted))
    return predictions
