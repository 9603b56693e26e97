"""The command that compares encoders: compare-encoders."""

from __future__ import annotations

import contextlib

import typer

from pipeline.cli.errors import errors
from pipeline.cli.options import Json, options
from pipeline.cli.terminal import ProgressLine, complain, print_json, say
from pipeline.evaluation.comparison_config import ComparisonConfig
from train.torch_import import start_torch


@options
def compare_encoders(*, config: ComparisonConfig, as_json: Json = False) -> None:
    """Find the encoder whose features give the best captions of these photos.

    Extracts features with each backbone, trains a model on them for some minutes, and scores the
    models on the same held-out photos. After an interruption the same command goes on; a command
    with more backbones adds them.

    Example: cap compare-encoders --images photos --captions captions.csv --backbones
    mobilenet_v2,resnet50
    """
    with errors(f"what is done is kept in {config.out}; run the same command to go on"):
        start_torch(config.device)
        from pipeline.evaluation.comparison import Comparison
        from pipeline.evaluation.comparison import compare_encoders as compare
        from pipeline.extraction.fill import Progress

        with contextlib.ExitStack() as shown:
            line: ProgressLine | None = None
            for report in compare(config):
                if isinstance(report, Progress):
                    if line is None:
                        line = shown.enter_context(ProgressLine(report.stage, "photos"))
                    done = report.done + report.unreadable
                    line.update(done, report.total, report.photos_per_s)
                    continue
                shown.close()
                line = None
                if isinstance(report, str):
                    say(report)
                elif isinstance(report, Comparison):
                    if as_json:
                        print_json(report.as_dict())
                    else:
                        print(report.table())
                    if report.failed:
                        complain(f"{len(report.failed)} of the backbones could not be compared")
                        raise typer.Exit(1)
                else:
                    say(report.line())
