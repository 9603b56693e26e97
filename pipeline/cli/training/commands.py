"""The commands that make models, and what belongs to them: build-vocab, train, sweep, runs,
import-classic.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.errors import errors
from pipeline.cli.options import CaptionColumn, ImageColumn, Json, choice, options
from pipeline.cli.terminal import complain, print_json, say
from pipeline.cli.training.together import connect, signals_left_to_the_first
from train.captions.script import TOKENIZER_HELP, TOKENIZERS
from train.config import SweepConfig, TrainConfig
from train.step.processes.launch import Launch, launched
from train.torch_import import start_torch

_SAME_MOMENT_S = 1.0


def build_vocab(
    source: Annotated[Path, typer.Option("--from", help="A cache or a captions file.")],
    min_count: Annotated[
        int, typer.Option(min=1, help="Keep words that occur at least this often.")
    ] = 4,
    tokenizer: Annotated[
        str | None,
        choice(f"{TOKENIZER_HELP}  [default: treebank; a cache knows its own]", TOKENIZERS),
    ] = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the vocabulary to.")] = None,
    as_json: Json = False,
) -> None:
    """Count words and show the vocabulary that a minimum count gives.

    It helps to choose the --min-count of `cap train`, which makes its vocabulary itself. All
    captions in a cache or a captions file are counted. `cap train` counts only those that it trains
    on, without the held-out photos and those that could not be read.

    Example: cap build-vocab --from train.h5 --min-count 4
    """
    with errors():
        from pipeline.inspection.vocabulary_report import vocabulary_report

        report = vocabulary_report(
            source,
            min_count,
            tokenizer,
            image_column=image_column,
            caption_column=caption_column,
            say=say,
        )
        if report.unfit is not None:
            say(report.unfit)
        if out is not None:
            report.vocabulary.save(out)
            say(f"written to {out}")
        if as_json:
            print_json(report.as_dict())
        else:
            print(report.summary())


@options
def train(*, config: TrainConfig, as_json: Json = False) -> None:
    """Train a captioning model on cached features.

    Example: cap train --from-cache train.h5 --out runs/base
    """
    started = saved = False

    def kept() -> str:
        if not started:
            return "training had not begun; run the same command again"
        if saved:
            return f"the model so far is in {config.out}; go on with --resume"
        # A second Ctrl-C leaves what was saved before the first.
        if (config.out / "checkpoint.pt").exists():
            return f"the last checkpoint is in {config.out}; go on with --resume"
        return "no checkpoint was saved; start again with --overwrite"

    with errors(kept):
        launch = launched()
        start_torch(config.device if launch is None else launch.own_device(config.device))
        from pipeline.cli.training.progress import TrainingProgress
        from train.fit.reports import EpochLog, Started
        from train.fit.run import train as run_training

        best, stopped = None, False
        processes = None if launch is None else connect(launch)
        with (
            _between_steps(launch) as interrupted,
            TrainingProgress(every_step_log=config.log_every is not None) as progress,
            contextlib.closing(
                run_training(config, notice_of_curves=progress.say, processes=processes)
            ) as reports,
        ):
            for report in reports:
                if report is not None:
                    progress.show(report)
                started = started or isinstance(report, Started)
                if isinstance(report, EpochLog) and report.best:
                    best = report
                if interrupted():
                    stopped = True
                    break
        if stopped:
            saved = True
            raise KeyboardInterrupt
        if as_json:
            print_json(
                {
                    "model": str(config.out / "best.cap"),
                    "epoch": None if best is None else best.epoch + 1,
                    "val_loss": None if best is None else best.val_loss,
                    "cider": None if best is None else best.cider,
                }
            )
            return
        scores = (
            f" (epoch {best.epoch + 1}: validation loss {best.val_loss:.4f}, "
            f"CIDEr {100 * best.cider:.1f})"
            if best is not None
            else ""
        )
        print(f"{config.out / 'best.cap'}{scores}")


@contextlib.contextmanager
def _between_steps(launch: Launch | None) -> Iterator[Callable[[], bool]]:
    """Hold back the first Ctrl-C until the caller asks for it, so that no step is left half done.

    SIGTERM, which schedulers and `kill` send, does the same. A second one interrupts at once. Those
    of the same moment count once if torchrun, which has started this process, passes on what the
    process may have got itself.
    """
    if launch is not None and launch.rank:
        with signals_left_to_the_first():
            yield lambda: False
        return
    pressed, pressed_at = False, 0.0
    signals = (signal.SIGINT, signal.SIGTERM)

    def press(signum: int, frame: object) -> None:
        nonlocal pressed, pressed_at
        if launch is not None and pressed:
            if time.monotonic() - pressed_at < _SAME_MOMENT_S:
                return
            raise KeyboardInterrupt
        pressed, pressed_at = True, time.monotonic()
        if launch is None:
            for each in signals:
                signal.signal(each, signal.default_int_handler)

    before = {each: signal.signal(each, press) for each in signals}
    try:
        yield lambda: pressed
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


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
    plot: Annotated[
        Path | None,
        typer.Option(help="PNG to draw the training curves of the runs into, over one another."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List runs with their scores, best first.

    Only scores of the same validation photos compare: runs are ranked among those that were judged
    alike. What their data and settings differ in is shown too.

    Example: cap runs runs/ --plot runs.png
    """
    with errors():
        from train.fit.record.run_table import find_runs, plot_runs, runs_table

        if plot is not None:
            from train.fit.record.curves import check_replaceable

            check_replaceable(plot)
        found = find_runs(folder)
        for run in found:
            if run.problem:
                complain(run.problem)
        if as_json:
            print_json([run.as_dict() for run in found])
        else:
            print(runs_table(found))
        if plot is not None:
            drawn = plot_runs(folder, found, plot)
            say(f"drew {drawn} run{'' if drawn == 1 else 's'} into {plot}")
