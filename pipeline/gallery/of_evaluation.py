"""The gallery of an evaluation: photos of a cache with their references and their own CIDEr."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from cache.errors import CapError
from cache.store import DONE, UNREADABLE, FeatureCache, open_cache
from pipeline.evaluation.evaluate import Evaluation, Result, ScoredPredictions
from pipeline.gallery.gallery import Gallery, Piece, ShownCaption, ShownPhoto
from pipeline.gallery.of_predictions import model_name, search_in_words, shown_prediction
from pipeline.photos.drive.answers import prompt_answer_of
from train.config import SearchConfig


class EvaluationGallery:
    """A gallery of a cache's photos. A context manager, as `Gallery` is."""

    def __init__(self, folder: Path, images: Path, cache_path: Path) -> None:
        """images: the folder that the cache was extracted from.

        Raises CapError if it holds none of the cache's photos, CacheError, GalleryError or
        WriteError.
        """
        self._images, self._cache = images, open_cache(cache_path)
        check_images(images, self._cache)
        self._gallery = Gallery(folder)

    def write_model(
        self,
        evaluation: Evaluation,
        model: Path,
        search: SearchConfig,
        *,
        whole: bool,
        report: Callable[[int, int], None] | None = None,
    ) -> str:
        """Show what a model says. Returns a line about the page.

        whole: whether all photos of the cache were scored; then those that were set aside when it
        was extracted are shown, too. report: is told how many photos of how many are ready. Raises
        what `Gallery.finish` raises.
        """
        cider = _cider_of(evaluation, evaluation.references)
        shown = {
            image: shown_prediction(
                prediction,
                evaluation.vocabulary,
                evaluation.references.get(image, ()),
                cider.get(image),
            )
            for image, prediction in evaluation.predictions.items()
        }
        title = f"Captions by {model_name(model)}"
        return self._write(
            shown, title, [*_facts(evaluation), search_in_words(search)], whole, report
        )

    def write_file(
        self,
        scored: ScoredPredictions,
        predictions: Path,
        *,
        report: Callable[[int, int], None] | None = None,
    ) -> str:
        """Show the captions of a file in COCO's results format; otherwise as `write_model`."""
        cider = _cider_of(scored, scored.references)
        paths = dict(zip(self._cache.image_ids, self._cache.paths, strict=True))
        shown = {
            image: ShownPhoto(
                paths[image],
                (ShownCaption((Piece(text),)),),
                references=tuple(scored.references[image]),
                cider=100 * cider[image],
            )
            for image, text in scored.hypotheses.items()
        }
        title = f"Captions of {predictions.name}"
        return self._write(shown, title, _facts(scored), False, report)

    def _write(
        self,
        shown: dict[str, ShownPhoto],
        title: str,
        facts: Sequence[str],
        whole: bool,
        report: Callable[[int, int], None] | None,
    ) -> str:
        cache = self._cache
        digests = cache.digests
        aside = set(cache.rows_with(UNREADABLE).tolist()) if whole else set()
        ids = cache.image_ids
        rows = [row for row in range(len(cache)) if row in aside or ids[row] in shown]
        for done, row in enumerate(rows, 1):
            if row in aside:
                self._gallery.add(ShownPhoto(cache.paths[row], error=cache.error(row)), None)
            else:
                digest = np.array(digests[row]) if digests[row].any() else None
                self._gallery.add(shown[ids[row]], self._images / cache.paths[row], digest)
            if report is not None:
                report(done, len(rows))
        return self._gallery.finish(title, [cache.path.name, *facts])

    def __enter__(self) -> Self:
        self._gallery.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._gallery.__exit__(kind, error, trace)


def check_images(images: Path, cache: FeatureCache) -> None:
    """Raise CapError if a folder holds none of the cache's photos, or StalledError."""
    rows = cache.rows_with(DONE).tolist()
    if not prompt_answer_of(
        lambda: any((images / cache.paths[row]).is_file() for row in rows), str(images)
    ):
        raise CapError(
            f"{images}: holds no photo of {cache.path}; name the folder that was given to "
            "`cap extract-features --images`"
        )


def _cider_of(result: Result, references: dict[str, list[str]]) -> dict[str, float]:
    return dict(zip(references, result.scores.photos.cider.tolist(), strict=True))


def _facts(result: Result) -> list[str]:
    scores = result.scores
    return [f"CIDEr {100 * scores.cider:.1f}", f"BLEU-4 {100 * scores.bleu_4:.1f}"]
