"""Measure what each ingredient of the best recipe contributes by leaving it out.

    python scripts/ablation.py --from-cache train.h5 --test-cache dev.h5 --out runs/ablation

Every variant is trained once per seed. Photos held out of the training cache choose its best epoch;
the test cache is used only to score that epoch. Both caches need two views or more. After an
interruption, the same command continues. Prints a Markdown table of the mean over the seeds with
the smallest and the largest value.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cache.atomic import write_text
from cache.errors import CapError
from pipeline.evaluation.evaluate import evaluate
from train.config import BEST, CLASSIC, MEAN, Recipe, SearchConfig, TrainConfig
from train.fit.reports import EpochLog
from train.fit.run import train

_BEAM, _MEAN_VIEW = SearchConfig(beam_size=5), SearchConfig(beam_size=5, view=MEAN)


@dataclass(frozen=True)
class Variant:
    recipe: Recipe
    search: SearchConfig = _BEAM


_REWARDED = dataclasses.replace(BEST, self_critical_epochs=2)
VARIANTS = {
    "best recipe": Variant(BEST),
    "greedy search": Variant(BEST, SearchConfig(beam_size=1)),
    "mean view": Variant(BEST, _MEAN_VIEW),
    "photo at step 1 alone": Variant(dataclasses.replace(BEST, photo_every_step=False)),
    "separate word vectors": Variant(dataclasses.replace(BEST, tie_embeddings=False)),
    "no dropout": Variant(dataclasses.replace(BEST, dropout=0.0, feature_dropout=0.0)),
    "no dropout of features": Variant(dataclasses.replace(BEST, feature_dropout=0.0)),
    "no label smoothing": Variant(dataclasses.replace(BEST, label_smoothing=0.0)),
    "no weight decay": Variant(dataclasses.replace(BEST, weight_decay=0.0)),
    "no average of weights": Variant(dataclasses.replace(BEST, average_decay=0.0)),
    "falling learning rate": Variant(dataclasses.replace(BEST, decay="cosine", warmup=0.05)),
    "one view in training": Variant(dataclasses.replace(BEST, random_views=False)),
    "two self-critical epochs": Variant(_REWARDED),
    "two self-critical epochs by greedy search": Variant(_REWARDED, SearchConfig(beam_size=1)),
    "two self-critical epochs and mean view": Variant(_REWARDED, _MEAN_VIEW),
    "ten classic epochs": Variant(dataclasses.replace(CLASSIC, epochs=10)),
    "classic recipe by greedy search": Variant(CLASSIC, SearchConfig(beam_size=1)),
}
_SHOWN = ("bleu_1", "bleu_4", "meteor", "rouge_l", "cider")


def main(
    from_cache: Annotated[Path, typer.Option(help="Cache of the training photos.")],
    test_cache: Annotated[Path, typer.Option(help="Cache of the photos to score on.")],
    out: Annotated[Path, typer.Option(help="Folder for the runs and their scores.")],
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 1,
    only: Annotated[
        str | None, typer.Option(help="Comma-separated variants. Default: all.")
    ] = None,
) -> None:
    names = [name.strip() for name in only.split(",")] if only else list(VARIANTS)
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise typer.BadParameter(f"no variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        for seed in range(seeds):
            for name in names:
                found[name].append(_score(name, seed, from_cache, test_cache, out))
    except CapError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(_table(found))


def _score(name: str, seed: int, from_cache: Path, test_cache: Path, out: Path) -> dict[str, Any]:
    variant = VARIANTS[name]
    result = out / f"{_file_name(name)}-{seed}.json"
    if result.exists():
        scores: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return scores
    started = time.perf_counter()
    run = _trained(variant.recipe, seed, from_cache, out)
    scores = evaluate(run, test_cache, variant.search).scores.as_dict()
    scores["minutes"] = (time.perf_counter() - started) / 60
    write_text(result, json.dumps(scores, indent=1) + "\n")
    return scores


def _trained(recipe: Recipe, seed: int, from_cache: Path, out: Path) -> Path:
    """Train a recipe, unless that is done, and return its run folder.

    Variants that differ only in their search share a run. A recipe with self-critical epochs
    continues a copy of the run without them.
    """
    name = next(n for n, variant in VARIANTS.items() if variant.recipe == recipe)
    run = out / f"{_file_name(name)}-{seed}"
    if (run / "done").exists():
        return run
    if recipe.self_critical_epochs and not run.exists():
        before = dataclasses.replace(recipe, self_critical_epochs=0)
        with tempfile.TemporaryDirectory(dir=out) as folder:
            copied = Path(folder) / "run"
            shutil.copytree(_trained(before, seed, from_cache, out), copied)
            (copied / "done").unlink()
            copied.rename(run)
    resume = (run / "checkpoint.pt").exists()
    config = TrainConfig(from_cache=from_cache, out=run, recipe=recipe, seed=seed, resume=resume)
    for report in train(config):
        if isinstance(report, EpochLog):
            print(f"{name}, seed {seed}: {report.line()}", file=sys.stderr, flush=True)
    (run / "done").touch()
    return run


def _file_name(variant: str) -> str:
    return variant.replace(" ", "-")


def _table(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| | BLEU-1 | BLEU-4 | METEOR | ROUGE-L | CIDEr |", "|---|---|---|---|---|---|"]
    for name, runs in found.items():
        cells = []
        for key in _SHOWN:
            values = [100 * run[key] for run in runs if run.get(key) is not None]
            if not values:
                cells.append("–")
                continue
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
