"""The command from photos to a cache: extract-features."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from pipeline.cli.errors import errors
from pipeline.cli.options import Json, options
from pipeline.cli.terminal import ProgressLine, duration, one_line, print_json, say
from pipeline.extraction.config import ExtractConfig

if TYPE_CHECKING:
    from cache.store import FeatureCache
    from pipeline.extraction.extract import Progress

_LISTED_ERRORS = 20


@options
def extract_features(*, config: ExtractConfig, as_json: Json = False) -> None:
    """Encode every photo once and store its features.

    Each photo passes through a frozen network. After an interruption, the same command continues
    where it stopped.

    Example: cap extract-features --images val2014 --captions captions_val2014.json --out val.h5
    """

    def kept() -> str:
        done = (
            f"what is done is kept in {config.out}"
            if config.out.exists()
            else "no photo was done yet"
        )
        return f"{done}; run the same command to go on"

    with errors(kept):
        from cache.store import open_cache

        last = _extract(config)
        cache = open_cache(config.out)
        _list_unreadable(cache)
        if as_json:
            print_json(
                {
                    "cache": str(config.out),
                    "done": last.done,
                    "unreadable": last.unreadable,
                    "new": last.new,
                    "seconds": round(last.elapsed_s, 3),
                    "photos_per_s": round(last.photos_per_s, 2),
                }
            )
        else:
            print(
                f"{config.out}: {last.done:,} photos of {cache.encoder.feature_dim} features"
                f" x {len(cache.encoder.views)} views, {len(cache.captions):,} captions;"
                f" {last.unreadable:,} set aside; {last.new:,} new in {duration(last.elapsed_s)}"
            )


def _extract(config: ExtractConfig) -> Progress:
    """Extract, showing notices and progress; the final progress."""
    from pipeline.extraction.extract import Notice, extract

    last: Progress | None = None
    with (
        ProgressLine("extracting", "photos") as line,
        contextlib.closing(extract(config)) as reports,
    ):
        for report in reports:
            if isinstance(report, Notice):
                line.say(report.text)
                continue
            last = report
            line.update(
                report.done + report.unreadable,
                report.total,
                report.photos_per_s,
                note=f"{report.unreadable:,} set aside" if report.unreadable else "",
            )
    assert last is not None
    return last


def _list_unreadable(cache: FeatureCache) -> None:
    unreadable = cache.errors()
    for path, reason in unreadable[:_LISTED_ERRORS]:
        say(one_line(f"{path}: {reason}; set aside"))
    if len(unreadable) > _LISTED_ERRORS:
        say(
            f"… and {len(unreadable) - _LISTED_ERRORS:,} more; "
            f"`cap info {cache.path} --unreadable` lists them all"
        )
