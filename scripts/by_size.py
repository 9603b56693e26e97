"""Measure what the recipes reach on little data: nested shares of one cache of photos.

    python scripts/by_size.py --from-cache train.h5 --test-cache dev.h5 --out runs/by-size

A share has the first N photos of a seeded order, so a larger one contains the smaller ones. On each
share `best` trains as it comes, and `classic` 10, 20 and 60 epochs; the best of its three scores
counts. The test cache is used only to score. After an interruption, the same command continues.
Prints a Markdown table of the means over the seeds. Beside other work, seconds say little; the
seconds of CPU time, which the table gives in brackets, say more.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from cache.atomic import write_text
from cache.errors import CapError
from cache.record import Skeleton, Strings
from cache.store import DONE, FeatureCache, open_cache
from cache.writer import open_writer
from pipeline.evaluation.evaluate import evaluate
from train.captions.numbering import build_caption_table
from train.config import BEST, CLASSIC, Recipe, SearchConfig, TrainConfig
from train.fit.reports import EpochLog
from train.fit.run import train

_SIZES = "50,100,250,500,1000,3000,6000"
_CLASSIC_EPOCHS = (10, 20, 60)
_SEARCH = SearchConfig()


def main(
    from_cache: Annotated[Path, typer.Option(help="Cache of the training photos.")],
    test_cache: Annotated[Path, typer.Option(help="Cache of the photos to score on.")],
    out: Annotated[Path, typer.Option(help="Folder for the shares, the runs and their scores.")],
    sizes: Annotated[str, typer.Option(help="Comma-separated numbers of photos.")] = _SIZES,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0.")] = 1,
) -> None:
    counts = [int(size) for size in sizes.split(",")]
    found: dict[int, list[dict[str, dict[str, Any]]]] = {size: [] for size in counts}
    out.mkdir(parents=True, exist_ok=True)
    try:
        for seed in range(seeds):
            for size in counts:
                share = _share(from_cache, size, out / f"{size}.h5")
                found[size].append(
                    {
                        "best": _best(share, test_cache, out / f"best-{size}-{seed}", seed),
                        "classic": _classic(
                            share, test_cache, out / f"classic-{size}-{seed}", seed
                        ),
                    }
                )
                print(_table(found), file=sys.stderr, flush=True)
    except CapError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(_table(found))


def _share(source: Path, size: int, path: Path) -> Path:
    """A cache of the first `size` photos of a seeded order of another one."""
    if path.exists():
        return path
    cache = open_cache(source)
    rows = np.random.default_rng(0).permutation(cache.rows_with(DONE))[:size]
    texts = cache.captions.by_row(len(cache))
    skeleton = Skeleton(
        image_ids=Strings.pack(cache.image_ids[row] for row in rows.tolist()),
        paths=Strings.pack(cache.paths[row] for row in rows.tolist()),
        captions=build_caption_table(
            [texts[row] for row in rows.tolist()], cache.captions.tokenizer
        ),
        encoder=cache.encoder,
        batch_rows=min(cache.batch_rows, len(rows)),
    )
    draft = path.with_suffix(".part.h5")
    draft.unlink(missing_ok=True)
    with open_writer(draft, skeleton, library_versions=cache.library_versions) as writer:
        writer.copy(np.arange(len(rows)), FeatureCache(source), rows)
    draft.rename(path)
    return path


def _best(share: Path, test_cache: Path, run: Path, seed: int) -> dict[str, Any]:
    """The scores of `best` as it comes."""
    return _scored(BEST, share, test_cache, run, seed, run.with_suffix(".json"))


def _classic(share: Path, test_cache: Path, run: Path, seed: int) -> dict[str, Any]:
    """The best scores of `classic` after some numbers of epochs."""
    scores, seconds = [], 0.0
    for epochs in _CLASSIC_EPOCHS:
        recipe = dataclasses.replace(CLASSIC, epochs=epochs)
        result = run.with_name(f"{run.name}-{epochs}.json")
        scored = _scored(recipe, share, test_cache, run, seed, result)
        seconds += scored["seconds"]
        scores.append({**scored, "seconds": seconds, "epochs": epochs})
    return max(scores, key=lambda scored: scored["cider"])


def _scored(
    recipe: Recipe, share: Path, test_cache: Path, run: Path, seed: int, result: Path
) -> dict[str, Any]:
    """Train, or go on with, a run, and score its best model on the test photos."""
    if result.exists():
        scores: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return scores
    started, cpu_started = time.perf_counter(), time.process_time()
    resume = (run / "checkpoint.pt").exists()
    if not resume:
        shutil.rmtree(run, ignore_errors=True)
    epochs = 0
    for report in train(TrainConfig(share, run, recipe=recipe, seed=seed, resume=resume)):
        if isinstance(report, EpochLog):
            epochs = report.epoch + 1
            if epochs % 10 == 0:
                print(f"{run.name}: {report.line()}", file=sys.stderr, flush=True)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    evaluated = evaluate(run, test_cache, _SEARCH, meteor=False).scores
    scores = {
        **evaluated.as_dict(),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "epochs": epochs,
    }
    write_text(result, json.dumps(scores, indent=1) + "\n")
    return scores


def _table(found: dict[int, list[dict[str, dict[str, Any]]]]) -> str:
    lines = [
        "| photos | `best` as it comes | trained | `classic`, the best of 10, 20 and 60 epochs |",
        "|---|---|---|---|",
    ]
    for size, runs in found.items():
        if not runs:
            continue
        best, classic = ([run[name] for run in runs] for name in ("best", "classic"))
        seconds, cpu = (
            statistics.mean(run[key] for run in best) for key in ("seconds", "cpu_seconds")
        )
        epochs = statistics.mean(run["epochs"] for run in best)
        chosen = ", ".join(sorted({str(run["epochs"]) for run in classic}, key=int))
        lines.append(
            f"| {size:,} | {_scores(best)} | {epochs:.0f} epochs in {seconds:.0f} s ({cpu:.0f} s) "
            f"| {_scores(classic)} ({chosen} epochs) |"
        )
    return "\n".join(lines)


def _scores(runs: list[dict[str, Any]]) -> str:
    cider, bleu = (100 * statistics.mean(run[key] for run in runs) for key in ("cider", "bleu_4"))
    return f"{cider:.1f} / {bleu:.1f}"


if __name__ == "__main__":
    typer.run(main)
