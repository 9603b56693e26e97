"""The commands for many runs: sweep, runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.errors import errors
from pipeline.cli.options import Json, options
from pipeline.cli.terminal import print_json, say
from train.config import SweepConfig


@options
def sweep(*, config: SweepConfig, as_json: Json = False) -> None:
    """Search for good training settings.

    The best trial is the one whose best.cap has the highest validation CIDEr. After an
    interruption, the same command continues the sweep.

    Example: cap sweep --from-cache train.h5 --out runs/sweep --trials 16
    """
    with errors(f"what is done is in {config.out}; the same command goes on"):
        from train.fit.reports import SweepResult
        from train.fit.sweeps.sweep import sweep as run_sweep

        for report in run_sweep(config):
            if not isinstance(report, SweepResult):
                say(report.line())
            elif as_json:
                print_json(report.as_dict())
            else:
                say(f"{report.trials} trials; `cap runs {config.out}` lists them")
                if report.threads is not None:
                    say(
                        "`cap train` with these options and another --out trains the best model "
                        f"again; with OMP_NUM_THREADS={report.threads} on this machine, to the bit"
                    )
                print(f"{report.folder / 'best.cap'} (CIDEr {100 * report.cider:.2f})")
                print(report.options())


def runs(
    folder: Annotated[Path, typer.Argument(help="A run folder, or a folder with runs below it.")],
    as_json: Json = False,
) -> None:
    """List runs with their scores, best first.

    The settings in which the runs differ are shown too.

    Example: cap runs runs/
    """
    with errors():
        from train.fit.sweeps.run_table import find_runs, runs_table

        found = find_runs(folder)
        for run in found:
            if run.problem:
                say(run.problem)
        if as_json:
            print_json([run.as_dict() for run in found])
        else:
            print(runs_table(found))
