"""Evaluation: scores of a model on a cache, of a file of predictions, and of people's captions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cache.atomic import WriteError
from cache.record import CacheError
from cache.store import open_cache
from cache.verify import check_rows
from pipeline.captioner.cached import caption_cache
from pipeline.captioner.predictions import Prediction
from pipeline.evaluation.references import (
    cache_references,
    coco_results,
    match,
    numbered_ids,
    read_predictions,
    references_of,
    rows_of,
    tokenizer_of,
)
from pipeline.evaluation.result_files import result_files, write_results
from train.captions.script import TREEBANK
from train.captions.tokenizer import tokenize
from train.captions.vocabulary import SPECIALS, Vocabulary
from train.config import SearchConfig, check_search
from train.device import resolve_device
from train.model.bundle import find_bundle, load_bundle
from train.scores.diversity import Diversity, diversity
from train.scores.human_agreement import Agreement, human_agreement
from train.scores.intervals import LEVEL, RESAMPLINGS, intervals
from train.scores.metrics import Scores, score


@dataclass(frozen=True)
class Result:
    """The scores of captions, with intervals, and how much the captions differ."""

    scores: Scores
    intervals: dict[str, tuple[float, float]]  # by name of the score: 95%, from resampled photos
    diversity: Diversity

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.scores.as_dict(),
            "intervals": {name: list(bounds) for name, bounds in self.intervals.items()},
            "diversity": self.diversity.as_dict(),
        }

    def summary(self) -> str:
        """The scores, one per line, times 100 as in papers."""
        lines = []
        for name, value in self.scores.as_dict().items():
            if isinstance(value, float):
                line = f"{name:<8} {100 * value:6.2f}"
                if name in self.intervals:
                    low, high = self.intervals[name]
                    line += f"  {100 * low:6.2f} – {100 * high:.2f}"
                lines.append(line)
        lines.append(
            f"{self.scores.count:,} photos, {self.scores.tokenizer} tokens, scores times 100; "
            f"{LEVEL:.0%} intervals from {RESAMPLINGS:,} resamplings of the photos"
        )
        return "\n".join([*lines, self.diversity.summary()])


@dataclass(frozen=True)
class Evaluation(Result):
    """The result of `evaluate`, the captions behind it, and the files it was written to."""

    predictions: dict[str, Prediction]  # by image id
    references: dict[str, list[str]]  # by image id, in the order of the photos' scores
    vocabulary: Vocabulary
    scores_file: Path
    predictions_file: Path
    problem: WriteError | None  # why the files were not written


@dataclass(frozen=True)
class ScoredPredictions(Result):
    """The result of `evaluate_predictions`, and the captions behind it."""

    hypotheses: dict[str, str]  # by image id
    references: dict[str, list[str]]  # by image id, in the order of the photos' scores


def evaluate(
    model: Path,
    cache_path: Path,
    search_config: SearchConfig,
    *,
    out: Path | None = None,
    only: Path | None = None,
    device: str = "auto",
    meteor: bool = True,
    report: Callable[[int, int], None] | None = None,
    others: int = 0,
) -> Evaluation:
    """Caption every photo of a cache and score the captions against those in the cache.

    only: a file with one photo name per line; other photos are left out. meteor: False to leave
    that score out, which takes most of the time. report: is told how many photos of how many are
    captioned. others: how many other captions of the search the predictions have, see
    `search_several`. Writes two files, called as `pipeline.evaluation.result_files` says, into
    `out` or beside the model; `problem` of the result says why not. Raises BundleError, CacheError
    (no captions, damaged rows, or features of another encoder), DatasetError (`only`),
    CaptionError, DeviceError, SearchError,
    ViewError or MetricsError.
    """
    check_search(search_config)
    model_file = find_bundle(model)
    bundle = load_bundle(model_file, resolve_device(device))
    asked = search_config
    search_config = search_config.up_to(bundle.vocabulary.longest)
    cache = open_cache(cache_path)
    difference = cache.encoder.difference(bundle.encoder)
    if difference is not None:
        raise CacheError(
            f"{cache_path}: made with {difference} as the features that the model was trained on"
        )
    references = {image: texts for image, texts in cache_references(cache, only).items() if texts}
    rows = rows_of(cache, only)
    check_rows(cache, rows)
    predictions = caption_cache(
        bundle, cache, search_config, rows=rows, report=report, others=others
    )
    captions = {image: " ".join(prediction.words) for image, prediction in predictions.items()}
    result = _score(
        {image: captions[image] for image in references},
        references,
        tokenizer=bundle.vocabulary.tokenizer,
        vocabulary=len(bundle.vocabulary) - len(SPECIALS),
        meteor=meteor,
    )
    files = result_files(model_file, cache, asked, out=out, only=only)
    problem = write_results(
        files,
        model_file,
        cache,
        search_config,
        result.as_dict(),
        coco_results(captions, numbered_ids(cache)),
    )
    return Evaluation(
        result.scores,
        result.intervals,
        result.diversity,
        predictions,
        references,
        bundle.vocabulary,
        scores_file=files[0],
        predictions_file=files[1],
        problem=problem,
    )


def evaluate_predictions(
    predictions: Path,
    *,
    cache: Path | None = None,
    captions: Path | Sequence[Path] | None = None,
    split: str | None = None,
    only: Path | None = None,
    tokenizer: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    all_photos: bool = False,
    meteor: bool = True,
    say: Callable[[str], None] | None = None,
) -> ScoredPredictions:
    """Score a file in COCO's results format against the captions of a cache or of a captions file.

    captions, split, only, image_column, caption_column, say: as for `read_photos`. tokenizer: what
    splits captions; None for that of the cache, or `treebank`. all_photos: refuse a file that
    leaves out photos; otherwise those that it has are scored, and a notice of the scores says how
    many of how many. Raises PredictionsError, CacheError, DatasetError or MetricsError.
    """
    found = read_predictions(predictions)
    references = references_of(
        cache=cache,
        captions=captions,
        split=split,
        only=only,
        image_column=image_column,
        caption_column=caption_column,
        say=say,
    )
    if isinstance(captions, Path) or not captions:
        source = str(captions or cache)
    else:
        source = ", ".join(map(str, captions))
    matched = match(found, references, predictions, source, all_photos=all_photos)
    result = _score(
        matched.hypotheses,
        matched.references,
        tokenizer=tokenizer or tokenizer_of(cache),
        meteor=meteor,
    )
    notices = (*([matched.notice] if matched.notice is not None else []), *result.scores.notices)
    return ScoredPredictions(
        replace(result.scores, notices=notices),
        result.intervals,
        result.diversity,
        matched.hypotheses,
        matched.references,
    )


def evaluate_people(
    *,
    cache: Path | None = None,
    captions: Path | Sequence[Path] | None = None,
    split: str | None = None,
    only: Path | None = None,
    tokenizer: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    meteor: bool = True,
    say: Callable[[str], None] | None = None,
) -> Agreement:
    """`human_agreement` of the captions of a cache or of a captions file.

    captions, split, only, image_column, caption_column, say: as for `read_photos`. tokenizer: what
    splits captions; None for that of the cache, or `treebank`. Raises CacheError, DatasetError or
    MetricsError.
    """
    references = references_of(
        cache=cache,
        captions=captions,
        split=split,
        only=only,
        image_column=image_column,
        caption_column=caption_column,
        say=say,
    )
    return human_agreement(references, tokenizer=tokenizer or tokenizer_of(cache), meteor=meteor)


def _score(
    captions: dict[str, str],
    references: dict[str, list[str]],
    *,
    tokenizer: str,
    vocabulary: int | None = None,
    meteor: bool,
) -> Result:
    scores = score(captions, references, tokenizer=tokenizer, meteor=meteor)
    spoken = list(captions.values())
    if tokenizer != TREEBANK:  # words that may have no spaces between them
        spoken = [" ".join(tokenize(caption, tokenizer)) for caption in spoken]
    return Result(scores, intervals(scores.photos), diversity(spoken, vocabulary))
