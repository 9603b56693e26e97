"""The sheet of an evaluation: photos of a cache with captions, and their references in grey."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from cache.store import open_cache
from pipeline.evaluation.evaluate import Evaluation, ScoredPredictions
from pipeline.evaluation.references import rows_of
from pipeline.gallery.of_evaluation import check_images
from pipeline.gallery.of_predictions import model_name
from pipeline.gallery.sheet.sheet import Tile, check_sheet, write_sheet

_REFERENCES = 2  # as many as leave room for the photos


class EvaluationSheet:
    """A sheet that is written when the captions are scored."""

    def __init__(
        self, path: Path, images: Path, cache_path: Path, only: Path | None, *, of_file: bool
    ) -> None:
        """images: the folder that the cache was extracted from. only: the list of photos to score.
        of_file: whether a file has captions of some of them.

        Raises SheetError, CacheError, DatasetError, or CapError if the folder holds none of the
        photos.
        """
        self._path, self._images, self._cache = path, images, open_cache(cache_path)
        check_images(images, self._cache)
        captions = self._cache.captions.by_row(len(self._cache))
        rows = rows_of(self._cache, only).tolist()
        check_sheet(path, 0 if of_file else sum(bool(captions[row]) for row in rows))

    def write_model(
        self,
        evaluation: Evaluation,
        model: Path,
        report: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Show what a model says. Returns lines for the user, as `write_sheet`, whose errors it
        raises.
        """
        said = {image: each.caption for image, each in evaluation.predictions.items()}
        return self._write(said, evaluation.references, f"captions by {model_name(model)}", report)

    def write_file(
        self,
        scored: ScoredPredictions,
        predictions: Path,
        report: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Show the captions of a file in COCO's results format; otherwise as `write_model`."""
        return self._write(
            scored.hypotheses, scored.references, f"captions of {predictions.name}", report
        )

    def _write(
        self,
        said: dict[str, str],
        references: dict[str, list[str]],
        legend: str,
        report: Callable[[int, int], None] | None,
    ) -> list[str]:
        cache, ids = self._cache, self._cache.image_ids
        tiles = [
            Tile(
                self._images / cache.paths[row],
                (said[ids[row]],),
                tuple(references.get(ids[row], ()))[:_REFERENCES],
                np.array(cache.digests[row]) if cache.digests[row].any() else None,
            )
            for row in range(len(cache))
            if ids[row] in said
        ]
        return write_sheet(
            tiles, self._path, legend=legend, notes_legend="references", report=report
        )
