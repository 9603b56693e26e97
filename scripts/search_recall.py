"""Measure the search by sentences: how well captions find their own photo among others.

    python scripts/search_recall.py --model runs/mine --cache dev.h5

Each caption of a photo ranks all photos of the cache by its likelihood. Recall@K is the share of
captions whose photo is among the first K; the median rank is that of their photos. Captions and
photos are those that the model was not trained on. The measure is that of Hodosh et al. (2013).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from cache.errors import CapError
from cache.store import DONE, open_cache
from pipeline.captioner.photo_search import Query
from train.captions.views import chosen_view, view_features
from train.config import AUTO
from train.model.bundle import load_bundle
from train.search.likelihood import log_likelihoods

_AT = (1, 5, 10)


def main(
    model: Annotated[Path, typer.Option(help="A run folder or a .cap file.")],
    cache: Annotated[Path, typer.Option(help="Cache of photos with captions.")],
    captions: Annotated[
        int, typer.Option(min=1, help="Captions of each photo that search for it.")
    ] = 1,
    photos: Annotated[
        int | None,
        typer.Option(min=1, help="Photos whose captions search, from the first on, among all."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    try:
        print(json.dumps(_measure(model, cache, captions, photos, torch.device(device)), indent=1))
    except CapError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _measure(
    model: Path, path: Path, captions: int, photos: int | None, device: torch.device
) -> dict[str, object]:
    bundle, cache = load_bundle(model, device), open_cache(path)
    difference = cache.encoder.difference(bundle.encoder)
    if difference is not None:
        raise CapError(f"{path}: made with {difference} as the features of the model")
    rows = cache.rows_with(DONE)
    view = chosen_view(AUTO, cache.encoder.views, bundle.training)
    features = view_features(cache, rows, view).to(device)
    texts = cache.captions.by_row(len(cache))
    ranks = []
    started = time.perf_counter()
    for place, row in enumerate(rows[:photos].tolist()):
        for text in texts[row][:captions]:
            words = Query.of(text, bundle.vocabulary).numbers
            own = log_likelihoods(bundle.decoder, features[place : place + 1], words)
            # Whoever is less likely before the last word is less likely after it.
            others = log_likelihoods(bundle.decoder, features, words, float(own[0]))
            better = others > own
            better[place] = False  # computed in another batch, it may differ in a last digit
            ranks.append(1 + int(better.sum()))
        if place % 50 == 49:
            print(f"captions of {place + 1:,} photos", file=sys.stderr, flush=True)
    return {
        "photos": len(rows),
        "captions": len(ranks),
        **{f"recall_at_{k}": float(np.mean(np.array(ranks) <= k)) for k in _AT},
        "median_rank": float(np.median(ranks)),
        "seconds": round(time.perf_counter() - started, 1),
    }


if __name__ == "__main__":
    typer.run(main)
