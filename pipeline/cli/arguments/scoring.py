"""Which options of `cap evaluate` go together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.cli.errors import WrongArguments


def check_what_is_scored(
    *,
    model: Path | None,
    predictions: Path | None,
    human: bool,
    cache: Path | None,
    captions: Sequence[Path] | None,
    of_captions: object,
    tokenizer: str | None,
    all_photos: bool,
    out: Path | None,
    gallery: Path | None,
    sheet: Path | None,
    images: Path | None,
    searches: bool,
) -> None:
    """Raise WrongArguments unless there is one source of captions and one of references, and every
    other option has an effect.

    of_captions: an option for captions files, or None. searches: whether an option of the search is
    given.
    """
    if (model is not None) + (predictions is not None) + human != 1:
        raise WrongArguments("give one of --model, --predictions and --human")
    if model is not None and (cache is None or captions):
        raise WrongArguments("a model needs the photos of a --cache (and not --captions)")
    if (cache is None) == (not captions):
        raise WrongArguments("give the references: --cache or --captions, one of them")
    if of_captions is not None and not captions:
        raise WrongArguments("--split and the columns are those of --captions")
    if model is None and searches:
        raise WrongArguments("the options of the search have no effect without --model")
    if model is None and out is not None:
        raise WrongArguments("--out has no effect without --model; send the scores to a file")
    if tokenizer is not None and captions is None:
        raise WrongArguments("--tokenizer is for --captions; a cache and a model know theirs")
    if predictions is None and all_photos:
        raise WrongArguments("--all has no effect without --predictions")
    for flag, page in (("--gallery", gallery), ("--sheet", sheet)):
        if page is None:
            continue
        if human:
            raise WrongArguments(f"{flag} shows captions of a model or of a file, not of people")
        if cache is None:
            raise WrongArguments(f"{flag} needs a --cache, which knows the files of its photos")
        if images is None:
            raise WrongArguments(f"{flag} needs --images, the folder of the cache's photos")
    if images is not None and gallery is None and sheet is None:
        raise WrongArguments("--images has no effect without --gallery or --sheet")
