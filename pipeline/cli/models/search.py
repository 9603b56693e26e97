"""The command that searches the photos of a cache: search."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from cache.errors import CapError
from pipeline.cli.errors import WrongArguments, errors
from pipeline.cli.options import Device, Json, MovedWeights, choice
from pipeline.cli.terminal import ProgressLine, one_field, print_json, say
from train.config import AUTO, FULL, MEAN
from train.torch_import import start_torch

_SOON_S = 3.0  # what takes longer shows how far it is


def search(
    *,
    words: Annotated[
        str | None, typer.Argument(help="A sentence, as a caption would say it.")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Cache of the photos to search.")],
    model: Annotated[
        Path | None, typer.Option(help="A run folder or a .cap file; for a sentence.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="Find photos that look like this one instead.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many photos to name, best first.")] = 20,
    images: Annotated[
        Path | None,
        typer.Option(help="The image folder, to be put before each path.", file_okay=False),
    ] = None,
    view: Annotated[
        str, choice("Search by full or mean features, as for cap predict.", (AUTO, FULL, MEAN))
    ] = AUTO,
    weights: MovedWeights = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find photos by a sentence, or by a photo, from cached features.

    Prints a line per photo: score, tab and path. With a sentence, the score says by how much the
    photo makes it likelier than the average photo does, as a logarithm. With --like it is the
    cosine of the features, less the average.

    Example: cap search "two dogs on a beach" --model runs/base --cache photos.h5
    """
    if (words is None) == (like is None):
        raise WrongArguments("search needs a sentence or --like PHOTO, one of the two")
    if words is not None and model is None:
        raise WrongArguments("a sentence needs --model, which has learned to read")
    if like is not None and model is not None:
        raise WrongArguments("--model has no effect on --like, which compares features alone")
    if like is not None and view != AUTO:
        raise WrongArguments("--view has no effect on --like; leave out one of the two")
    if words is not None and weights is not None:
        raise WrongArguments("--weights has no effect on a sentence; the features are cached")
    with errors():
        start_torch(device)
        from cache.store import open_cache
        from pipeline.captioner import photo_search
        from train.device import resolve_device
        from train.model.bundle import load_bundle

        opened = open_cache(cache)
        if like is not None and not like.exists():
            raise CapError(f"{like}: no such file")
        asked: dict[str, object] = {"words": None, "unknown": None, "like": None}
        with ProgressLine("searching", "photos", after_s=_SOON_S) as line:
            if like is not None:
                asked["like"] = str(like)
                found = photo_search.search_by_photo(
                    opened, like, top, device=device, weights=weights, report=line.update_timed
                )
            else:
                assert words is not None
                assert model is not None
                bundle = load_bundle(model, resolve_device(device))
                query = photo_search.Query.of(words, bundle.vocabulary)
                if query.unknown:
                    say(f"words that the model does not know: {', '.join(query.unknown)}")
                asked |= {"words": list(query.words), "unknown": list(query.unknown)}
                found = photo_search.search_by_words(
                    bundle, opened, query, top, view=view, report=line.update_timed
                )
        paths = [photo.path if images is None else str(images / photo.path) for photo in found]
        if as_json:
            photos = [
                {**photo.as_dict(), "path": path} for photo, path in zip(found, paths, strict=True)
            ]
            print_json({"cache": os.fspath(cache), **asked, "photos": photos})
            return
        for photo, path in zip(found, paths, strict=True):
            score = f"{photo.score:+.2f}" if like is None else f"{photo.score:.3f}"
            print(f"{score}\t{one_field(path)}", flush=True)
