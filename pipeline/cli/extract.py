"""The command from photos to a cache, extract-features, and the networks that it can use."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache.errors import CapError
from pipeline.cli.errors import WrongArguments, errors
from pipeline.cli.options import Json, options
from pipeline.cli.terminal import ProgressLine, duration, mention, one_line, print_json, say
from pipeline.encoder.networks.known_backbones import KNOWN_BACKBONES, backbones_table
from pipeline.encoder.networks.sources import TIMM
from pipeline.extraction.config import ExtractConfig, ExtractOptions, settled
from pipeline.extraction.distributed.config import RayOptions
from train.torch_import import start_torch

if TYPE_CHECKING:
    from cache.store import FeatureCache
    from pipeline.extraction.distributed.run import ClusterProgress
    from pipeline.extraction.fill import Progress

_LISTED_ERRORS = 20


@options
def extract_features(*, asked: ExtractOptions, cluster: RayOptions, as_json: Json = False) -> None:
    """Encode every photo once and store its features.

    Each photo passes through a frozen network. After an interruption, the same command continues
    where it stopped.

    Example: cap extract-features --images val2014 --captions captions_val2014.json --out val.h5
    """
    if cluster.ray is not None:
        _extract_on_cluster(asked, cluster, as_json)
        return
    before = _state(asked.out)
    with errors(lambda: _kept(asked.out, before)):
        config, taken = settled(asked)
        if taken is not None:
            say(taken)
        if config.dry_run:
            start_torch(config.device)
            _say_plan(config, as_json)
            return
        from pipeline.photos.readers.start import end_spare_readers, start_early

        start_early(config.workers, config.device)  # they import torch at the same time
        try:
            start_torch(config.device)
            last = _extract(config)
        finally:
            end_spare_readers()
        from cache.store import open_cache

        cache = open_cache(config.out)
        _list_unreadable(cache)
        if as_json:
            print_json(
                {
                    "cache": str(config.out),
                    "done": last.done,
                    "unreadable": last.unreadable,
                    "new": last.new,
                    "copied": last.copied,
                    "seconds": round(last.elapsed_s, 3),
                    "photos_per_s": round(last.photos_per_s, 2),
                }
            )
        else:
            copied = f", {last.copied:,} copied" if last.copied else ""
            print(
                f"{config.out}: {last.done:,} photos of {cache.encoder.feature_dim} features"
                f" x {len(cache.encoder.views)} views, {len(cache.captions):,} captions;"
                f" {last.unreadable:,} set aside; {last.new:,} new{copied}"
                f" in {duration(last.elapsed_s)}"
            )


# What a job on a cluster does not do, by the name of the setting.
_NOT_ON_CLUSTERS = ("shard", "reuse", "update", "retry_unreadable", "dry_run")


def _extract_on_cluster(asked: ExtractOptions, cluster: RayOptions, as_json: bool) -> None:
    from pipeline.extraction.distributed.job import folder_of

    for name in _NOT_ON_CLUSTERS:
        if getattr(asked, name):
            raise WrongArguments(f"--{name.replace('_', '-')} does not go with --ray")
    folder = folder_of(asked.out)
    with errors(
        lambda: (
            f"what is done is kept in {folder}; run the same command to go on"
            if folder.is_dir()
            else "nothing was begun; run the same command again"
        )
    ):
        config, taken = settled(asked)
        if taken is not None:
            say(taken)
        from pipeline.extraction.distributed.run import extract_on_cluster
        from pipeline.extraction.fill import Notice

        last: ClusterProgress | None = None
        with (
            ProgressLine("extracting", "photos") as line,
            contextlib.closing(extract_on_cluster(config, cluster)) as reports,
        ):
            for report in reports:
                if isinstance(report, Notice):
                    line.say(one_line(report.text), mention if report.detail else say)
                    continue
                last = report
                line.update(
                    report.done + report.unreadable,
                    report.total,
                    report.photos_per_s,
                    note=_on_cluster(report),
                )
        assert last is not None
        from cache.store import open_cache

        cache = open_cache(config.out)
        _list_unreadable(cache)
        if as_json:
            print_json(
                {
                    "cache": str(config.out),
                    "done": last.done,
                    "unreadable": last.unreadable,
                    "new": last.new,
                    "copied": 0,
                    "seconds": round(last.elapsed_s, 3),
                    "photos_per_s": round(last.photos_per_s, 2),
                    "shards": last.shards,
                    "cost": None if last.cost is None else round(last.cost, 4),
                }
            )
        else:
            cost = "" if last.cost is None else f", for {last.cost:,.2f}"
            print(
                f"{config.out}: {last.done:,} photos of {cache.encoder.feature_dim} features"
                f" x {len(cache.encoder.views)} views, {len(cache.captions):,} captions;"
                f" {last.unreadable:,} set aside; {last.new:,} new"
                f" in {duration(last.elapsed_s)}{cost}"
            )


def _on_cluster(report: ClusterProgress) -> str:
    """Shards, workers and cost, for a line of progress."""
    parts = [f"{report.shards_done:,}/{report.shards:,} shards"]
    if report.workers:
        parts.append("1 worker" if report.workers == 1 else f"{report.workers} workers")
    if report.unreadable:
        parts.append(f"{report.unreadable:,} set aside")
    if report.cost is not None:
        parts.append(f"cost so far {report.cost:,.2f}")
    return ", ".join(parts)


def _state(out: Path) -> tuple[int, int] | None:
    """What changes when a file is written or replaced; None if there is none."""
    try:
        status = out.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _kept(out: Path, before: tuple[int, int] | None) -> str:
    """After an interruption: what is kept, and how to go on. before: the file's state at first."""
    if _state(out) != before:
        return f"what is done is kept in {out}; run the same command to go on"
    nothing = "no photo was done yet" if before is None else f"{out} is as it was"
    return f"{nothing}; run the same command again"


def _extract(config: ExtractConfig) -> Progress:
    """Extract, showing notices and progress; the final progress."""
    from pipeline.extraction.extract import extract
    from pipeline.extraction.fill import Notice

    line: ProgressLine | None = None
    last: Progress | None = None
    with contextlib.ExitStack() as shown, contextlib.closing(extract(config)) as reports:
        for report in reports:
            if isinstance(report, Notice):
                told = mention if report.detail else say
                told(report.text) if line is None else line.say(report.text, told)
                continue
            if line is None or last is None or report.stage != last.stage:
                shown.close()
                unit = "files" if report.stage == "looking" else "photos"
                line = shown.enter_context(ProgressLine(report.stage, unit))
            last = report
            line.update(
                report.done + report.unreadable,
                report.total,
                report.photos_per_s,
                note=f"{report.unreadable:,} set aside" if report.unreadable else "",
            )
    assert last is not None
    return last


def _say_plan(config: ExtractConfig, as_json: bool) -> None:
    import dataclasses

    from cache.create import size_text
    from pipeline.extraction.plan import plan

    found = plan(config)
    if as_json:
        print_json({**dataclasses.asdict(found), "cache": str(found.cache)})
        return
    for notice in found.notices:
        say(notice)
    size, free = size_text(found.new_bytes), size_text(found.free_bytes)
    print(f"{found.cache}: {found.what}")
    print(f"photos      {found.photos:,}, with {found.captions:,} captions")
    print(f"to encode   {found.to_encode:,} in {found.precision}")
    if found.seconds is not None:
        print(f"time        about {duration(found.seconds)}, at {found.photos_per_s:,.1f} photos/s")
    print(f"disk        {size} more; {free} are free")


def _list_unreadable(cache: FeatureCache) -> None:
    unreadable = cache.errors()
    for path, reason in unreadable[:_LISTED_ERRORS]:
        say(one_line(f"{path}: {reason}; set aside"))
    if len(unreadable) > _LISTED_ERRORS:
        say(
            f"… and {len(unreadable) - _LISTED_ERRORS:,} more; "
            f"`cap info {cache.path} --unreadable` lists them all"
        )


def backbones(
    pattern: Annotated[
        str | None,
        typer.Argument(help="timm:PATTERN, as in 'timm:vit*': the names of timm's networks."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the networks that `--backbone` takes.

    For each of torchvision: its features per photo, the size of the download and the accuracy on
    ImageNet of the first of its published weights. Those of timm are listed by name, with the tags
    of their weights behind a point.

    Example: cap backbones
    """
    if pattern is not None:
        if not pattern.startswith(TIMM):
            raise WrongArguments(f"{pattern!r} is not timm:PATTERN, as in 'timm:vit*'")
        with errors():
            from pipeline.encoder.networks.timm_networks import timm_names

            names = [TIMM + name for name in timm_names(pattern.removeprefix(TIMM))]
            if not names:
                raise CapError(f"{pattern}: timm has no such network")
            if as_json:
                print_json([{"name": name} for name in names])
            else:
                print("\n".join(names))
    elif as_json:
        print_json([backbone.as_dict() for backbone in KNOWN_BACKBONES])
    else:
        print(backbones_table())
        mention(
            "timm:NAME takes a network of timm, FILE.py:FUNCTION your own, NAME+stages more of a "
            "network than its vector; see docs/encoders.md"
        )
