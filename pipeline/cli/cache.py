"""The commands around a cache: extract-features, merge, info, verify."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import Device, Json, defaults, errors, print_json
from pipeline.cli.terminal import ProgressLine, duration, say
from pipeline.config import ExtractConfig

if TYPE_CHECKING:
    from cache.store import FeatureCache
    from pipeline.extraction.extract import Progress

_LISTED_ERRORS = 20
_EXTRACT = defaults(ExtractConfig)


def extract_features(
    images: Annotated[Path, typer.Option(help="Folder of photos.")],
    out: Annotated[Path, typer.Option(help="The cache to write, or to go on with.")],
    captions: Annotated[
        Path | None,
        typer.Option(help="COCO or Karpathy JSON, Flickr CSV or token.txt. Without: photos alone."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Splits of a Karpathy JSON, as in train,restval.")
    ] = None,
    only: Annotated[
        Path | None, typer.Option(help="A file of photo names, one a line: only these.")
    ] = None,
    backbone: Annotated[str, typer.Option(help="Any torchvision classifier.")] = _EXTRACT[
        "backbone"
    ],
    weights: Annotated[
        str, typer.Option(help="A torchvision name, a .pth or .safetensors file, or random.")
    ] = _EXTRACT["weights"],
    views: Annotated[
        str,
        typer.Option(help="Comma-separated: full, flip, center, center-flip, corners."),
    ] = ",".join(_EXTRACT["views"]),
    image_size: Annotated[int, typer.Option(min=32, help="Pixels, both sides.")] = _EXTRACT[
        "image_size"
    ],
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Photos at once.  [default: 16 on a CPU, 256 on a GPU]"),
    ] = _EXTRACT["batch_size"],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Decoding threads.  [default: one per core]")
    ] = _EXTRACT["workers"],
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda (every GPU), cuda:N, or several: cuda:0,cuda:1.")
    ] = _EXTRACT["device"],
    precision: Annotated[
        str,
        typer.Option(help="auto (fast where it agrees with float32), float32, bfloat16, float16."),
    ] = _EXTRACT["precision"],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many photos.")
    ] = _EXTRACT["limit"],
    shard: Annotated[
        str | None,
        typer.Option(help="I/N: only the I-th of N shares, for `cap merge` to join.  [as in 2/8]"),
    ] = None,
    reuse: Annotated[
        Path | None,
        typer.Option(help="An older cache of the same encoder: unchanged photos come from it."),
    ] = _EXTRACT["reuse"],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew where a cache exists.")
    ] = False,
    retry_unreadable: Annotated[
        bool, typer.Option("--retry-unreadable", help="Try photos again that were set aside.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run every photo once through a frozen network and store its features.

    Interrupted, the same command goes on where it stopped.

    Example: cap extract-features --images val2014 --captions captions_val2014.json --out val.h5
    """

    def kept() -> str:
        done = f"what is done is kept in {out}" if out.exists() else "no photo was done yet"
        return f"{done}; run the same command to go on"

    with errors(kept):
        from pipeline.encoder.encoder import DTYPES
        from pipeline.extraction.extract import Notice, extract
        from pipeline.extraction.shards import parse_shard
        from pipeline.photos.views import parse_views

        try:
            parsed_views = parse_views(views)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--views") from None
        try:
            share = parse_shard(shard) if shard is not None else None
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--shard") from None
        if precision != "auto" and precision not in DTYPES:
            raise typer.BadParameter(
                f"{precision!r} is not auto, {', '.join(DTYPES)}", param_hint="--precision"
            )
        config = ExtractConfig(
            images=images,
            out=out,
            captions=captions,
            split=split,
            only=only,
            backbone=backbone,
            weights=weights,
            views=parsed_views,
            image_size=image_size,
            batch_size=batch_size,
            workers=workers,
            device=device,
            precision=precision,
            limit=limit,
            shard=share,
            reuse=reuse,
            overwrite=overwrite,
            retry_unreadable=retry_unreadable,
        )
        last: Progress | None = None
        with (
            ProgressLine("extracting", "photos") as line,
            contextlib.closing(extract(config)) as reports,
        ):
            for report in reports:
                if isinstance(report, Notice):
                    line.clear()
                    say(report.text)
                else:
                    last = report
                    aside = f", {report.unreadable:,} set aside" if report.unreadable else ""
                    line.update(
                        report.done + report.unreadable, report.total, report.photos_per_s, aside
                    )
        assert last is not None
        from cache.store import open_cache

        cache = open_cache(out)
        _list_unreadable(cache)
        if as_json:
            print_json(
                {
                    "cache": str(out),
                    "done": last.done,
                    "unreadable": last.unreadable,
                    "new": last.new,
                    "seconds": round(last.elapsed_s, 3),
                    "photos_per_s": round(last.photos_per_s, 2),
                }
            )
        else:
            print(
                f"{out}: {last.done:,} photos of {cache.encoder.feature_dim} features"
                f" x {len(cache.encoder.views)} views, {len(cache.captions):,} captions;"
                f" {last.unreadable:,} set aside; {last.new:,} new in {duration(last.elapsed_s)}"
            )


def _list_unreadable(cache: FeatureCache) -> None:
    errors = cache.errors()
    for path, reason in errors[:_LISTED_ERRORS]:
        say(f"{path}: {reason}; set aside")
    if len(errors) > _LISTED_ERRORS:
        say(
            f"… and {len(errors) - _LISTED_ERRORS:,} more; "
            f"`cap info {cache.path} --unreadable` lists them all"
        )


def merge(
    caches: Annotated[list[Path], typer.Argument(help="Finished caches of one encoder.")],
    out: Annotated[Path, typer.Option(help="The cache to make.")],
    deduplicate: Annotated[
        bool,
        typer.Option(
            "--deduplicate", help="Leave out photos that an earlier cache has, byte for byte."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Join caches into one: the shards of one set of photos, or several sets.

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
    cache: Annotated[Path, typer.Argument(help="A feature cache.")],
    unreadable: Annotated[
        bool, typer.Option("--unreadable", help="List the photos set aside, with reasons.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what is inside a cache and how it was made.

    Example: cap info val.h5
    """
    with errors():
        from cache.store import DONE, PENDING, open_cache

        opened = open_cache(cache, allow_pending=True)
        if unreadable and not as_json:
            for path, reason in opened.errors():
                print(f"{path}\t{reason}")
            return
        facts: dict[str, Any] = {
            "photos": len(opened),
            "done": len(opened.rows_with(DONE)),
            "pending": len(opened.rows_with(PENDING)),
            "unreadable": len(opened.errors()),
            "captions": len(opened.captions),
            "distinct_words": len(opened.captions.words),
            "size_bytes": cache.stat().st_size,
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


def verify(
    cache: Annotated[Path, typer.Argument(help="A feature cache.")],
    images: Annotated[
        Path | None, typer.Option(help="The photos' folder. Without: the cache's checksums alone.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Photos to compare and encode again.")] = 64,
    weights: Annotated[
        str | None, typer.Option(help="Where the backbone's weights lie now, if moved.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check a cache: its checksums, its photos, and that features come out the same again.

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
