"""The commands for finished caches: merge, info, verify."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.errors import WrongArguments, errors
from pipeline.cli.options import CaptionColumn, Device, ImageColumn, Json, MovedWeights
from pipeline.cli.terminal import one_field, one_line, print_json, say


def merge(
    caches: Annotated[list[Path], typer.Argument(help="Finished caches of one encoder.")],
    out: Annotated[Path, typer.Option(help="The cache to write.")],
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
    with errors(f"{out} was not made"):
        from cache.merge import merge as join

        report = join(caches, out, deduplicate=deduplicate, overwrite=overwrite)
        if as_json:
            print_json({"cache": str(out), **dataclasses.asdict(report)})
            return
        left_out = (
            f"; {report.duplicates:,} duplicates left out"
            f" with {report.duplicate_captions:,} captions"
            if report.duplicates
            else ""
        )
        print(
            f"{out}: {report.photos:,} photos of {report.caches} caches,"
            f" {report.captions:,} captions; {report.unreadable:,} set aside{left_out}"
        )


def info(
    file: Annotated[Path, typer.Argument(help="A feature cache or a captions file.")],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the photos that a captions file names.")
    ] = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    unreadable: Annotated[
        bool, typer.Option("--unreadable", help="List the photos that were set aside, and why.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what is inside a cache and how it was made, or how a captions file is understood.

    Example: cap info val.h5
    """
    with errors():
        from cache.seal import is_cache
        from pipeline.captions.dataset import WITHOUT_FILE

        is_text = file.is_file() and file.suffix.lower() not in (".h5", ".hdf5")
        if str(file) in WITHOUT_FILE or (is_text and not is_cache(file)):
            if unreadable:
                raise WrongArguments("--unreadable is for caches")
            _show_captions(file, images, image_column, caption_column, as_json)
            return
        if images or image_column or caption_column:
            raise WrongArguments("--images and the columns are for captions files")
        from cache.store import DONE, PENDING, open_cache

        opened = open_cache(file, allow_pending=True)
        if unreadable and not as_json:
            for path, reason in opened.errors():
                print(f"{one_field(path)}\t{one_line(reason)}")
            return
        facts: dict[str, Any] = {
            "photos": len(opened),
            "done": len(opened.rows_with(DONE)),
            "pending": len(opened.rows_with(PENDING)),
            "unreadable": len(opened.errors()),
            "captions": len(opened.captions),
            "distinct_words": len(opened.captions.words),
            "tokenizer": opened.captions.tokenizer,
            "size_bytes": file.stat().st_size,
            **dataclasses.asdict(opened.encoder),
            "batch_rows": opened.batch_rows,
            **({"shard": str(opened.shard)} if opened.shard else {}),
            "library_versions": opened.library_versions,
        }
        if as_json:
            if unreadable:
                facts["errors"] = [{"path": p, "reason": r} for p, r in opened.errors()]
            print_json(facts)
            return
        for name, value in facts.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {item}" for key, item in value.items())
            elif isinstance(value, tuple):
                value = ",".join(value)
            print(f"{name:<16} {value:,}" if isinstance(value, int) else f"{name:<16} {value}")


def _show_captions(
    file: Path,
    images: Path | None,
    image_column: str | None,
    caption_column: str | None,
    as_json: bool,
) -> None:
    from pipeline.captions.dataset import read_dataset
    from pipeline.captions.records import Choice

    dataset = read_dataset(file, Choice(None, image_column, caption_column), images=images)
    if as_json:
        (source,) = dataset.sources
        print_json(source.as_dict())
    else:
        print("\n".join(dataset.lines()))


def verify(
    cache: Annotated[Path, typer.Argument(help="A feature cache.")],
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of the photos; without it, only checksums are checked."),
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Photos to compare and encode again.")] = 64,
    weights: MovedWeights = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check a cache: checksums, photos and features.

    Compares a sample of the photos with their digests, and encodes them again to see whether the
    features come out the same.

    Example: cap verify val.h5 --images val2014
    """
    with errors():
        from pipeline.extraction.verify import verify_cache

        result = verify_cache(cache, images, sample=sample, weights=weights, device=device)
        for problem in result.problems:
            say(problem)
        if as_json:
            print_json({**dataclasses.asdict(result), "ok": result.ok})
        else:
            print(result.summary())
        if not result.ok:
            raise typer.Exit(1)
