"""The commands over many runs: sweep, runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import Device, Json, defaults, errors, print_json
from pipeline.cli.terminal import say
from train.config import SweepConfig

_SWEEP = defaults(SweepConfig)


def sweep(
    from_cache: Annotated[Path, typer.Option(help="Cache of the training photos.")],
    out: Annotated[Path, typer.Option(help="Folder of the sweep; each trial is a run below it.")],
    val_cache: Annotated[
        Path | None,
        typer.Option(help="Cache to validate on. Without: some photos are held out."),
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Trials in the folder, those of earlier calls included.")
    ] = _SWEEP["trials"],
    epochs: Annotated[int, typer.Option(min=1, help="Of each trial.")] = _SWEEP["epochs"],
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Trials at a time.  [default: one per core, one on a GPU]"),
    ] = _SWEEP["jobs"],
    timeout_s: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds after which no further trial starts.")
    ] = _SWEEP["timeout_s"],
    min_count: Annotated[
        int, typer.Option(min=1, help="Words seen less often become <unk>.")
    ] = _SWEEP["min_count"],
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = _SWEEP["seed"],
    device: Device = _SWEEP["device"],
    as_json: Json = False,
) -> None:
    """Search for good training settings, by validation CIDEr; the same command goes on.

    Example: cap sweep --from-cache train.h5 --out runs/sweep --trials 16
    """
    with errors(f"what is done is in {out}; the same command goes on"):
        from train.fit.reports import SweepResult
        from train.fit.sweep import sweep as run_sweep

        config = SweepConfig(
            from_cache=from_cache,
            out=out,
            val_cache=val_cache,
            trials=trials,
            epochs=epochs,
            jobs=jobs,
            timeout_s=timeout_s,
            min_count=min_count,
            seed=seed,
            device=device,
        )
        for report in run_sweep(config):
            if not isinstance(report, SweepResult):
                say(report.line())
            elif as_json:
                print_json(report.as_dict())
            else:
                say(f"{report.trials} trials; `cap runs {out}` lists them")
                print(f"{report.folder / 'best.cap'} (CIDEr {100 * report.cider:.2f})")
                print(report.options())


def runs(
    folder: Annotated[Path, typer.Argument(help="A run folder, or one with runs below it.")],
    as_json: Json = False,
) -> None:
    """List runs with their scores and the settings that differ, best first.

    Example: cap runs runs/
    """
    with errors():
        from train.fit.run_table import find_runs, runs_table

        found = find_runs(folder)
        for run in found:
            if run.problem:
                say(run.problem)
        if as_json:
            print_json([run.as_dict() for run in found])
        else:
            print(runs_table(found))
