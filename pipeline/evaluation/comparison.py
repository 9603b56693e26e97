"""Which encoder is best for these photos: extract with each, train shortly, compare captions.

All models learn from the same photos, in the same number of steps, and caption the same photos that
none of them has seen. What is done is kept in the folder, so the same command goes on after an
interruption, and encoders can be added to a comparison.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.atomic import write_text
from cache.create import size_text
from cache.errors import CapError
from cache.store import DONE, FeatureCache, open_cache
from pipeline.evaluation.comparison_config import ComparisonConfig
from pipeline.evaluation.evaluate import evaluate
from pipeline.extraction.config import ExtractOptions, settled
from pipeline.extraction.extract import extract
from pipeline.extraction.fill import Notice, Progress
from pipeline.photos.sources.places import without_secrets
from train.config import BEST, FixedRecipe, SearchConfig, TrainConfig
from train.fit.data_recipe import data_recipe
from train.fit.reports import EpochLog
from train.fit.run import train

# Photos held out: a tenth, at least these many, but at most a fifth; and never more than these.
_HELD_OUT_SHARE, _FEWEST_HELD_OUT, _LARGEST_HELD_OUT_SHARE, _MOST_HELD_OUT = 0.1, 100, 0.2, 1000
_FACTS = "encoders.json"
_HELD_OUT = "held-out.txt"


@dataclass(frozen=True)
class Compared:
    """What an encoder reached."""

    backbone: str
    weights: str
    features: int  # numbers per photo and view
    image_size: int
    cider: float  # of the held-out photos, as a fraction
    bleu_4: float
    ciders: tuple[float, ...]  # of each held-out photo, in the order of their names
    photos_per_s: float  # of the extraction
    cache_bytes: int
    photos: int
    train_s: float

    @property
    def standard_error(self) -> float:
        """Of `cider`, from which photos happen to be held out."""
        return float(np.std(self.ciders, ddof=1) / math.sqrt(len(self.ciders)))

    def as_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        del fields["ciders"]
        return {**fields, "cider_standard_error": self.standard_error}


@dataclass(frozen=True)
class Comparison:
    """Encoders, the best first, and those that could not be compared, with the reason."""

    compared: tuple[Compared, ...]
    failed: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return {"encoders": [each.as_dict() for each in self.compared], "failed": self.failed}

    def table(self) -> str:
        """A line for each encoder, then one about what the difference between the first two means.

        Scores are times 100.
        """
        lines = []
        if self.compared:
            width = max(8, *(len(each.backbone) for each in self.compared))
            lines.append(
                f"{'backbone':<{width}}  CIDEr ± s.e.  BLEU-4  photos/s  features  cache size  "
                "trained in"
            )
            lines += [
                f"{each.backbone:<{width}}  {100 * each.cider:>5.1f} ± "
                f"{100 * each.standard_error:<4.1f}  {100 * each.bleu_4:>6.1f}  "
                f"{each.photos_per_s:>8.1f}  {each.features:>8,}  "
                f"{size_text(each.cache_bytes):>10}  {each.train_s:>8.0f} s"
                for each in self.compared
            ]
        if len(self.compared) > 1:
            lines.append(self._first_two())
        lines += [f"{name}: {reason}" for name, reason in self.failed.items()]
        return "\n".join(lines)

    def _first_two(self) -> str:
        first, second = self.compared[:2]
        # On the same photos, so photo by photo: easy and hard photos cancel out.
        differences = np.subtract(first.ciders, second.ciders)
        error = float(np.std(differences, ddof=1) / math.sqrt(len(differences)))
        ahead = f"{100 * (first.cider - second.cider):.1f} ± {100 * error:.1f}"
        meaning = (
            "more than chance"
            if first.cider - second.cider > 2 * error
            else "which may be chance; more photos or other seeds would tell"
        )
        return (
            f"{first.backbone} is ahead of {second.backbone} by {ahead} CIDEr on the same "
            f"{len(differences):,} photos: {meaning}"
        )


def compare_encoders(config: ComparisonConfig) -> Iterator[str | Progress | EpochLog | Comparison]:
    """Extract, train and score with each backbone in turn. Yields what happens, then the result.

    An encoder that cannot be used is told in the result, and the others go on. Raises CapError if
    the folder holds a comparison of other photos or settings, or cannot be written.
    """
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        facts = _recorded(config)
    except OSError as error:
        raise CapError(f"{config.out}: cannot write there ({error.strerror or error})") from None
    failed: dict[str, str] = {}
    compared = []
    for backbone in config.backbones:
        kept = facts["encoders"].get(_key(config, backbone))
        if kept is not None:
            yield f"{backbone}: compared before"
            compared.append(Compared(**{**kept, "ciders": tuple(kept["ciders"])}))
            continue
        yield f"{backbone}: extracting features"
        try:
            found = yield from _compare(config, backbone, facts)
        except CapError as error:
            failed[backbone] = str(error)
            yield f"{backbone}: {error}"
            continue
        compared.append(found)
        facts["encoders"][_key(config, backbone)] = dataclasses.asdict(found)
        _write(config, facts)
    compared.sort(key=lambda each: -each.cider)
    yield Comparison(tuple(compared), failed)


def _compare(
    config: ComparisonConfig, backbone: str, facts: dict[str, Any]
) -> Generator[str | Progress | EpochLog, None, Compared]:
    name = re.sub(r"[^\w.-]", "_", _key(config, backbone))
    path, run = config.out / f"{name}.h5", config.out / name
    options = ExtractOptions(
        images=config.images,
        out=path,
        captions=config.captions or None,
        image_column=config.image_column,
        caption_column=config.caption_column,
        split=config.split,
        tokenizer=config.tokenizer,
        backbone=backbone,
        weights=config.weights_of(backbone),
        views=config.views,
        image_size=config.image_size,
        device=config.device,
        limit=config.limit,
    )
    for report in extract(settled(options)[0]):
        if isinstance(report, Notice):
            if not report.detail:
                yield f"{backbone}: {report.text}"
        else:
            # A run that was interrupted between extraction and training has no new photos.
            if report.new:
                facts["photos_per_s"][path.name] = report.photos_per_s
            yield report
    _write(config, facts)
    cache = open_cache(path)
    held_out = _held_out(config, cache)
    recipe, steps = _recipe(config, cache)
    yield f"{backbone}: training {recipe.epochs:,} epochs of {steps:,} steps"
    resume = (run / "checkpoint.pt").exists()
    trained_s = facts["trained_s"]
    for trained in train(
        TrainConfig(
            from_cache=path,
            out=run,
            val_list=held_out,
            recipe=recipe,
            seed=config.seed,
            device=config.device,
            resume=resume,
            overwrite=not resume,
        )
    ):
        if isinstance(trained, EpochLog):
            trained_s[name] = trained_s.get(name, 0.0) + trained.seconds
            _write(config, facts)
            yield trained
    result = evaluate(run, path, SearchConfig(), only=held_out, device=config.device, meteor=False)
    return Compared(
        backbone=backbone,
        weights=cache.encoder.weights,
        features=cache.encoder.feature_dim,
        image_size=cache.encoder.image_size,
        cider=result.scores.cider,
        bleu_4=result.scores.bleu_4,
        ciders=tuple(result.scores.photos.cider.tolist()),
        photos_per_s=facts["photos_per_s"].get(path.name, 0.0),
        cache_bytes=path.stat().st_size,
        photos=len(cache.rows_with(DONE)),
        train_s=trained_s.get(name, 0.0),
    )


def _key(config: ComparisonConfig, backbone: str) -> str:
    weights = config.weights_of(backbone)
    return backbone if weights is None else f"{backbone}={weights}"


def _recipe(config: ComparisonConfig, cache: FeatureCache) -> tuple[FixedRecipe, int]:
    """(the recipe `best` for these data, but of about `config.steps` steps; steps of an epoch)."""
    rows = cache.captions.rows[cache.status[cache.captions.rows] == DONE]
    held_out = _held_out_count(len(np.unique(rows))) / max(1, len(np.unique(rows)))
    captions = round((1 - held_out) * len(rows))
    recipe = data_recipe(BEST, captions)
    steps = max(1, math.ceil(captions / recipe.batch_size))
    epochs = max(1, round(config.steps / steps))
    return dataclasses.replace(recipe, epochs=epochs, patience_steps=None), steps


def _held_out_count(photos: int) -> int:
    most = min(_MOST_HELD_OUT, max(1, int(_LARGEST_HELD_OUT_SHARE * photos)))
    return min(most, max(_FEWEST_HELD_OUT, round(_HELD_OUT_SHARE * photos)))


def _held_out(config: ComparisonConfig, cache: FeatureCache) -> Path:
    """The file that names the photos held out, the same for all encoders. Raises CapError."""
    path = config.out / _HELD_OUT
    if not path.exists():
        rows = np.unique(cache.captions.rows[cache.status[cache.captions.rows] == DONE])
        if len(rows) < 2:
            raise CapError(f"{cache.path}: a comparison needs two photos with captions")
        random = np.random.default_rng(config.seed)
        chosen = np.sort(random.choice(rows, _held_out_count(len(rows)), replace=False))
        write_text(path, "".join(f"{cache.paths[row]}\n" for row in chosen.tolist()))
    return path


def _absolute(images: Path | str) -> str:
    """Where the photos are, whatever the working folder; without secrets of an address."""
    return without_secrets(images) if isinstance(images, str) else str(images.absolute())


def _recorded(config: ComparisonConfig) -> dict[str, Any]:
    """What earlier commands found in this folder. Raises CapError if they compared otherwise."""
    settings = {
        "images": _absolute(config.images),
        "captions": [str(path.absolute()) for path in config.captions],
        **{
            name: getattr(config, name)
            for name in ("image_size", "split", "tokenizer", "limit", "steps", "seed")
        },
        "views": list(config.views),
    }
    path = config.out / _FACTS
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        recorded = facts["settings"]
    except FileNotFoundError:
        if any(config.out.iterdir()):
            raise CapError(
                f"{config.out}: holds something else than a comparison; name another --out"
            ) from None
        facts = {"settings": settings, "photos_per_s": {}, "trained_s": {}, "encoders": {}}
        _write(config, facts)
        return facts
    except (ValueError, KeyError, TypeError):
        raise CapError(f"{path}: not the record of a comparison; name another --out") from None
    for name, value in settings.items():
        if recorded.get(name) != value:
            raise CapError(
                f"{config.out}: compares with {name.replace('_', ' ')} {recorded.get(name)}, not "
                f"{value}; name another --out"
            )
    return facts


def _write(config: ComparisonConfig, facts: dict[str, Any]) -> None:
    write_text(config.out / _FACTS, json.dumps(facts, indent=1) + "\n")
