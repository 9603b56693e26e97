"""The commands for finished caches: merge, info, verify."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.errors import WrongArguments, errors
from pipeline.cli.options import (
    CaptionColumn,
    Device,
    ImageColumn,
    Json,
    MovedWeights,
    OwnBackbone,
    own_or_moved,
)
from pipeline.cli.terminal import complain, one_field, one_line, print_json
from pipeline.photos.sources.patterns import photos_at


def merge(
    caches: Annotated[list[Path], typer.Argument(help="Finished caches of one encoder.")],
    out: Annotated[Path, typer.Option(help="The cache to write, or the catalogue.")],
    catalogue: Annotated[
        bool,
        typer.Option(
            "--catalogue",
            help="Write a catalogue, which is read like a cache: names, captions, and where the "
            "caches are. It copies no features, so keep the caches.",
        ),
    ] = False,
    deduplicate: Annotated[
        bool,
        typer.Option(
            "--deduplicate",
            help="Leave out photos that another cache has; one that could be read is kept.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Join caches into one.

    They are the shards of one set of photos, or caches of several sets.

    Example: cap merge train.1.h5 train.2.h5 --out train.h5
    """
    if catalogue and deduplicate:
        raise WrongArguments("a catalogue lists whole caches; --deduplicate is for merging")
    with errors(f"{out} was not made"):
        from cache.derived.catalogue import write_catalogue
        from cache.merge import merge as join

        report = (
            write_catalogue(caches, out, overwrite=overwrite)
            if catalogue
            else join(caches, out, deduplicate=deduplicate, overwrite=overwrite)
        )
        if as_json:
            print_json({"cache": str(out), **dataclasses.asdict(report), "is_catalogue": catalogue})
            return
        left_out = (
            f"; {report.duplicates:,} duplicates left out"
            f" with {report.duplicate_captions:,} captions"
            if report.duplicates
            else ""
        )
        print(
            f"{out}: {'catalogue of ' if catalogue else ''}"
            f"{report.photos:,} photos of {report.caches} caches,"
            f" {report.captions:,} captions; {report.unreadable:,} set aside{left_out}"
        )


def info(
    file: Annotated[Path, typer.Argument(help="A cache, model, run, captions file, …")],
    images: Annotated[
        str | None,
        typer.Option(help="Folder of the photos that a captions file names, or tars and the like."),
    ] = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    unreadable: Annotated[
        bool, typer.Option("--unreadable", help="List the photos that were set aside, and why.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a file or a folder is, and what is inside.

    A cache and how it was made, a model with its encoder, words and scores, a run, a checkpoint,
    weights, a folder of photos; or how a captions file is understood.

    Example: cap info val.h5
    """
    with errors():
        from pipeline.captions.dataset import WITHOUT_FILE
        from pipeline.inspection.contents import facts_of, facts_table, json_facts
        from pipeline.inspection.kinds import Kind, kind_of

        kind = Kind.TEXT if str(file) in WITHOUT_FILE else kind_of(file)
        if unreadable and kind is not Kind.CACHE:
            raise WrongArguments("--unreadable is for caches")
        of_captions = images or image_column or caption_column
        if kind is Kind.TEXT:
            facts = None if of_captions else json_facts(file)
            if facts is None:
                _show_captions(file, images, image_column, caption_column, as_json)
                return
        else:
            if of_captions and kind is not Kind.ABSENT:
                raise WrongArguments("--images and the columns are for captions files")
            if unreadable and not as_json:
                _list_unreadable(file)
                return
            facts = facts_of(file)
        if not as_json:
            print(facts_table(facts))
            return
        if unreadable:
            facts["errors"] = [{"path": p, "reason": r} for p, r in _unreadable(file)]
        print_json(facts)


def _unreadable(cache: Path) -> list[tuple[str, str]]:
    from cache.store import open_cache

    return open_cache(cache, allow_pending=True).errors()


def _list_unreadable(cache: Path) -> None:
    for path, reason in _unreadable(cache):
        print(f"{one_field(path)}\t{one_line(reason)}")


def _show_captions(
    file: Path,
    images: str | None,
    image_column: str | None,
    caption_column: str | None,
    as_json: bool,
) -> None:
    from pipeline.captions.dataset import read_dataset
    from pipeline.captions.records import Choice

    choice = Choice(None, image_column, caption_column)
    dataset = read_dataset(file, choice, images=None if images is None else photos_at(images))
    if as_json:
        (source,) = dataset.sources
        print_json(source.as_dict())
    else:
        print("\n".join(dataset.lines()))


def verify(
    cache: Annotated[Path, typer.Argument(help="A feature cache.")],
    images: Annotated[
        str | None,
        typer.Option(
            help="Folder of the photos, or what else extract-features took; without it, only "
            "checksums are checked."
        ),
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Photos to compare and encode again.")] = 64,
    backbone: OwnBackbone = None,
    weights: MovedWeights = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check a cache: checksums, photos and features.

    Compares a sample of the photos with their digests, and encodes them again to see whether the
    features come out the same.

    Example: cap verify val.h5 --images val2014
    """
    weights = own_or_moved(backbone, weights)
    with errors():
        from pipeline.extraction.verify import verify_cache

        photos = None if images is None else photos_at(images)
        result = verify_cache(cache, photos, sample=sample, weights=weights, device=device)
        for problem in result.problems:
            complain(problem)
        if as_json:
            print_json({**dataclasses.asdict(result), "ok": result.ok})
        else:
            print(result.summary())
        if not result.ok:
            raise typer.Exit(1)
