"""Lists run folders side by side: the settings and the scores of each.

Scores compare where the same photos were judged by the same captions. Runs that share both are a
group, and are ranked inside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from cache.errors import CapError
from train.fit.record.curves import PlottedRun, draw_runs
from train.fit.record.metrics import epoch_records
from train.fit.record.run_folder import validated_on
from train.model.bundle import BundleError, find_bundle, read_training


class RunsError(CapError):
    """Raised when a folder is missing or holds no runs. The message is one line."""


@dataclass(frozen=True)
class JudgedOn:
    """What the scores of a run are of. Those of equal `id` and `search` compare."""

    id: str  # of the photos and their captions, whatever cache they are in
    search: str  # greedy or beam: of the captions that were scored
    photos: int
    captions: int | None  # None and no cache in runs of earlier versions
    cache: str | None  # its file's name


@dataclass(frozen=True)
class RunSummary:
    """A run folder with the scores of its best.cap, which are None before the first epoch ends.

    Without a best.cap they are those of last.cap. If neither has scores, they are those in the log
    of the epoch whose model was best.cap, or, in a log that does not name it, of the epoch with the
    highest CIDEr.

    Scores are those of greedy captions of the validation photos, or of beam search's captions if
    `select_by` is beam.
    """

    path: Path
    epochs: int  # finished
    best_epoch: int | None  # from 0
    cider: float | None
    bleu_4: float | None
    val_loss: float | None
    settings: dict[str, Any]  # of its training
    problem: str = ""  # why the settings could not be read
    judged_on: JudgedOn | None = None  # None if nothing recorded it
    # `cache`, `photos` and `captions`; empty in runs of earlier versions
    trained_on: dict[str, Any] = field(default_factory=dict)
    # Of runs whose scores compare: the number of their group and the place in it, both from 1.
    group: int | None = None
    rank: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields for JSON, with epochs counted from 1."""
        best = None if self.best_epoch is None else self.best_epoch + 1
        return {**asdict(self), "path": str(self.path), "best_epoch": best}


def find_runs(folder: Path) -> list[RunSummary]:
    """All runs in or below a folder, by groups of which each was judged alike.

    The group with the most validation photos comes first. In a group the best validation CIDEr
    comes first, and runs without a score last. Runs of which nothing tells what they were judged on
    come at the end, by their names. Raises RunsError if there are none.
    """
    if not folder.is_dir():
        raise RunsError(f"{folder}: no such folder")
    files = [*folder.rglob("metrics.jsonl"), *folder.rglob("best.cap"), *folder.rglob("last.cap")]
    runs = [_read(path) for path in sorted({file.parent for file in files})]
    if not runs:
        raise RunsError(f"{folder}: no runs below it; `cap train` makes one")
    alike: dict[tuple[str, str], list[RunSummary]] = {}
    for run in runs:
        if run.judged_on is not None:
            alike.setdefault((run.judged_on.id, run.judged_on.search), []).append(run)
    groups = sorted(alike.values(), key=_group_key)
    ranked = [
        replace(run, group=number, rank=rank)
        for number, group in enumerate(groups, 1)
        for rank, run in enumerate(sorted(group, key=score_key, reverse=True), 1)
    ]
    return ranked + [run for run in runs if run.judged_on is None]


def _group_key(group: list[RunSummary]) -> tuple[int, str]:
    judged = group[0].judged_on
    assert judged is not None
    return -judged.photos, min(str(run.path) for run in group)


def score_key(run: RunSummary) -> tuple[float, float]:
    """Larger is better. CIDEr comes first: label smoothing and vocabulary affect the loss."""
    worst = float("-inf")
    return (
        worst if run.cider is None else run.cider,
        worst if run.val_loss is None else -run.val_loss,
    )


def _read(path: Path) -> RunSummary:
    epochs = epoch_records(path / "metrics.jsonl")
    training, scores, problem = _read_model(path)
    best = scores if scores.get("cider") is not None else _best_record(epochs)
    return RunSummary(
        path=path,
        epochs=len({record["epoch"] for record in epochs}),
        best_epoch=best.get("epoch"),
        cider=best.get("cider"),
        bleu_4=best.get("bleu_4"),
        val_loss=best.get("val_loss"),
        settings=_settings(training),
        problem=problem,
        judged_on=_judged_on(path, training),
        trained_on=_trained_on(training),
    )


def _judged_on(path: Path, training: dict[str, Any]) -> JudgedOn | None:
    """By the model's record, or, of an earlier version, by the checkpoint's."""
    search = "beam" if _settings(training).get("select_by") == "beam" else "greedy"
    record = training.get("judged_on")
    if isinstance(record, dict) and isinstance(record.get("id"), str):
        count, captions = (record.get(name) for name in ("photos", "captions"))
        return JudgedOn(
            id=record["id"],
            search=search,
            photos=count if isinstance(count, int) else 0,
            captions=captions if isinstance(captions, int) else None,
            cache=str(record["cache"]) if record.get("cache") else None,
        )
    if not training:
        return None
    identity = validated_on(path) or ""
    _, _, number, *_ = [*identity.split(), "", "", ""]
    if not number.isdigit():
        return None
    return JudgedOn(id=identity, search=search, photos=int(number), captions=None, cache=None)


def _settings(training: dict[str, Any]) -> dict[str, Any]:
    settings = training.get("config")
    return dict(settings) if isinstance(settings, dict) else {}


def _trained_on(training: dict[str, Any]) -> dict[str, Any]:
    record = training.get("trained_on")
    return dict(record) if isinstance(record, dict) else {}


def _best_record(epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of the epoch that made the best model; empty if there are no epochs."""
    chosen = [record for record in epochs if record.get("best")]
    if chosen:
        return chosen[-1]
    return max(epochs, key=lambda e: (e.get("cider", float("-inf")), -e["val_loss"]), default={})


def _read_model(path: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(what the run's model file records of its training, its scores, a problem)."""
    try:
        training = read_training(find_bundle(path))
    except BundleError as error:
        return {}, {}, str(error)
    scores = training.get("scores") or {}
    facts = {"epoch": training.get("epoch"), "val_loss": training.get("val_loss"), **scores}
    return training, facts, ""


def plot_runs(folder: Path, runs: Iterable[RunSummary], picture: Path) -> int:
    """Draw the training curves of runs over one another. Returns how many had any.

    folder, runs: as for `find_runs`, which gives them. Raises CurvesError or WriteError.
    """
    plotted = []
    for run in runs:
        below = str(run.path.relative_to(folder))
        name = folder.absolute().name if below == "." else below
        plotted.append(PlottedRun(name, run.group or 0, run.path))
    return draw_runs(plotted, picture)


def runs_table(runs: Iterable[RunSummary]) -> str:
    """A table for each group, headed by what its runs were judged on.

    runs: as `find_runs` gives them.
    """
    groups = [list(group) for _, group in groupby(runs, key=lambda run: run.group)]
    return "\n\n".join(f"{_headline(group)}\n{_table(group)}" for group in groups)


def _headline(group: list[RunSummary]) -> str:
    judged = [run.judged_on for run in group if run.judged_on is not None]
    if not judged:
        return "not recorded what these were judged on, so they are in no order:"
    first = judged[0]
    photos = f"{first.photos:,} photo{'' if first.photos == 1 else 's'}"
    captions = next((f" ({one.captions:,} captions)" for one in judged if one.captions), "")
    caches = list(dict.fromkeys(one.cache for one in judged if one.cache))
    named = f" of {' and of '.join(caches)}" if caches else " (of a cache that is not recorded)"
    by = "beam search's captions" if first.search == "beam" else "greedy captions"
    return f"judged on {photos}{captions}{named}, by {by}:"


def _table(group: list[RunSummary]) -> str:
    """One line per run: scores, epochs done, then what is not the same in all runs.

    What is unknown of a run does not count as different.
    """
    runs = [(run, _facts(run)) for run in group]
    names = list(dict.fromkeys(name for _, facts in runs for name in facts))
    known = [facts for _, facts in runs if facts]
    differing = [name for name in names if len({str(one.get(name, "")) for one in known}) > 1]
    # Not "epochs", which is the name of a setting.
    header = ["run", "CIDEr", "BLEU-4", "val loss", "done", *differing]
    rows = [
        [
            str(run.path),
            _format_score(run.cider, 100, ".2f"),
            _format_score(run.bleu_4, 100, ".2f"),
            _format_score(run.val_loss, 1, ".4f"),
            str(run.epochs),
            *(_format_setting(facts.get(name)) for name in differing),
        ]
        for run, facts in runs
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _facts(run: RunSummary) -> dict[str, Any]:
    """What may tell runs apart: their data, then their settings."""
    data = {name: run.trained_on[name] for name in ("cache", "photos") if name in run.trained_on}
    return data | run.settings


def _format_score(value: float | None, scale: float, form: str) -> str:
    return "-" if value is None else format(scale * value, form)


def _format_setting(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
