"""Scores of a model over a cache, and its captions in COCO's results format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.atomic import write_text
from cache.record import CacheError
from cache.store import open_cache
from pipeline.captioner import Prediction, caption_cache
from train.bundle import find_bundle, load_bundle
from train.config import SearchConfig
from train.device import resolve_device
from train.metrics import Scores, score


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found and where it wrote it."""

    scores: Scores
    predictions: dict[str, Prediction]  # by image id
    references: dict[str, list[str]]  # by image id
    scores_file: Path
    predictions_file: Path

    def summary(self) -> str:
        """The scores, one a line, times 100 as papers print them."""
        lines = []
        for name, value in self.scores.as_dict().items():
            if isinstance(value, float):
                lines.append(f"{name:<8} {100 * value:6.2f}")
        count = f"{self.scores.count:,} photos, {self.scores.tokenizer} tokens, scores times 100"
        return "\n".join([*lines, count])


def evaluate(
    model: Path, cache_path: Path, search_config: SearchConfig, *, device: str = "auto"
) -> Evaluation:
    """Caption every photo of a cache and score the captions against the cache's own.

    Writes `NAME.scores.json` and `NAME.predictions.json` beside the model, NAME being the cache's.
    Raises BundleError, CacheError (no captions, or features of another encoder) or MetricsError.
    """
    bundle = load_bundle(model, resolve_device(device))
    cache = open_cache(cache_path)
    difference = cache.encoder.difference(bundle.encoder)
    if difference is not None:
        raise CacheError(f"{cache_path}: made with {difference} as the model was trained on")
    captions = cache.captions.by_row(len(cache))
    if not any(captions):
        raise CacheError(f"{cache_path}: holds no captions to score against")
    predictions = caption_cache(bundle, cache, search_config)
    references = {
        image_id: texts for image_id, texts in zip(cache.image_ids, captions, strict=True) if texts
    }
    scored = [image_id for image_id in predictions if image_id in references]
    if not scored:
        raise CacheError(f"{cache_path}: no photo that was extracted has captions")
    scores = score(
        {image_id: predictions[image_id].caption for image_id in scored},
        {image_id: references[image_id] for image_id in scored},
    )
    folder = find_bundle(model).parent
    scores_file = folder / f"{cache_path.stem}.scores.json"
    predictions_file = folder / f"{cache_path.stem}.predictions.json"
    _write_json(
        scores_file,
        {
            "model": find_bundle(model).name,
            "cache": cache_path.name,
            "beam_size": search_config.beam_size,
            "max_length": search_config.max_length,
            "length_penalty": search_config.length_penalty,
            **scores.as_dict(),
        },
    )
    _write_json(predictions_file, coco_results(predictions))
    return Evaluation(scores, predictions, references, scores_file, predictions_file)


def coco_results(predictions: dict[str, Prediction]) -> list[dict[str, Any]]:
    """COCO's results format: `[{"image_id": 42, "caption": "a dog"}, …]`, ids as numbers."""
    return [
        {
            "image_id": int(image_id) if image_id.isdecimal() else image_id,
            "caption": prediction.caption,
        }
        for image_id, prediction in predictions.items()
    ]


def _write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
