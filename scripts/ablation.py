"""What each ingredient of the best recipe brings: it is left out, one at a time.

    python scripts/ablation.py --from-cache train.h5 --test-cache dev.h5 --out runs/ablation

Every variant is trained with each seed, its best epoch chosen by photos held out of the training
cache, and scored on the test cache, which chooses nothing. Interrupted, the same command goes on.
Prints a table in Markdown: the mean over the seeds, and the spread (largest minus smallest).
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cache.atomic import write_text
from cache.errors import CapError
from pipeline.evaluate import evaluate
from train.config import BEST, CLASSIC, Recipe, SearchConfig, TrainConfig
from train.run import EpochLog, train

# Name → recipe and search.
_BEAM = SearchConfig(beam_size=5)
VARIANTS: dict[str, tuple[Recipe, SearchConfig]] = {
    "best recipe": (BEST, _BEAM),
    "greedy search": (BEST, SearchConfig(beam_size=1)),
    "photo at step 1 alone": (dataclasses.replace(BEST, photo_every_step=False), _BEAM),
    "separate word vectors": (dataclasses.replace(BEST, tie_embeddings=False), _BEAM),
    "no dropout": (dataclasses.replace(BEST, dropout=0.0, feature_dropout=0.0), _BEAM),
    "no dropout of features": (dataclasses.replace(BEST, feature_dropout=0.0), _BEAM),
    "no label smoothing": (dataclasses.replace(BEST, label_smoothing=0.0), _BEAM),
    "no weight decay": (dataclasses.replace(BEST, weight_decay=0.0), _BEAM),
    "no average of weights": (dataclasses.replace(BEST, average_decay=0.0), _BEAM),
    "level learning rate": (dataclasses.replace(BEST, decay="constant", warmup=0.0), _BEAM),
    "one view in training": (dataclasses.replace(BEST, random_views=False), _BEAM),
    "ten classic epochs": (dataclasses.replace(CLASSIC, epochs=10), _BEAM),
    "classic recipe by greedy search": (CLASSIC, SearchConfig(beam_size=1)),
}
_SHOWN = ("bleu_1", "bleu_4", "meteor", "rouge_l", "cider")


def main(
    from_cache: Annotated[Path, typer.Option(help="Cache of the training photos.")],
    test_cache: Annotated[Path, typer.Option(help="Cache to score on.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs and their scores.")],
    seeds: Annotated[int, typer.Option(min=1, help="0 to this, less one.")] = 1,
    only: Annotated[
        str | None, typer.Option(help="Comma-separated variants; without: all of them.")
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
    recipe, search = VARIANTS[name]
    result = out / f"{name.replace(' ', '-').replace(',', '')}-{seed}.json"
    if result.exists():
        scores: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return scores
    # Variants of the search alone share a run.
    same = next(n for n, variant in VARIANTS.items() if variant[0] == recipe)
    run = out / f"{same.replace(' ', '-').replace(',', '')}-{seed}"
    started = time.perf_counter()
    if not (run / "done").exists():
        resume = (run / "checkpoint.pt").exists()
        for report in train(
            TrainConfig(from_cache=from_cache, out=run, recipe=recipe, seed=seed, resume=resume)
        ):
            if isinstance(report, EpochLog):
                print(f"{same}, seed {seed}: {report.line()}", file=sys.stderr, flush=True)
        (run / "done").touch()
    scores = evaluate(run, test_cache, search).scores.as_dict()
    scores["minutes"] = (time.perf_counter() - started) / 60
    write_text(result, json.dumps(scores, indent=1) + "\n")
    return scores


def _table(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| | BLEU-1 | BLEU-4 | METEOR | ROUGE-L | CIDEr |", "|---|---|---|---|---|---|"]
    for name, runs in found.items():
        cells = []
        for key in _SHOWN:
            values = [100 * run[key] for run in runs if run.get(key) is not None]
            if not values:
                cells.append("–")
                continue
            spread = f" ±{max(values) - min(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
