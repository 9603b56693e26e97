"""The commands from a cache to a model: build-vocab, train."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli_options import Device, Json, defaults, errors, print_json
from pipeline.terminal import say
from train.config import FitConfig, TrainConfig

_TRAIN, _FIT = defaults(TrainConfig), FitConfig()


def build_vocab(
    source: Annotated[Path, typer.Option("--from", help="A cache or a captions file.")],
    min_count: Annotated[int, typer.Option(min=1, help="Keep words seen so often.")] = _TRAIN[
        "min_count"
    ],
    out: Annotated[Path | None, typer.Option(help="Write the vocabulary as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Count the words of captions and show the vocabulary that training would use.

    Example: cap build-vocab --from train.h5 --min-count 4
    """
    with errors():
        from pipeline.words import vocabulary_report

        report = vocabulary_report(source, min_count)
        if out is not None:
            report.vocabulary.save(out)
            say(f"written to {out}")
        if as_json:
            print_json(report.as_dict())
        else:
            print(report.summary())


def train(
    from_cache: Annotated[Path, typer.Option(help="Cache of the training photos.")],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    val_cache: Annotated[
        Path | None,
        typer.Option(help="Cache to validate on. Without: some photos are held out."),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = _FIT.epochs,
    batch_size: Annotated[int, typer.Option(min=1, help="Captions a step.")] = _FIT.batch_size,
    embedding_size: Annotated[int, typer.Option(min=1)] = _TRAIN["embedding_size"],
    hidden_size: Annotated[int, typer.Option(min=1)] = _TRAIN["hidden_size"],
    num_layers: Annotated[int, typer.Option(min=1, help="Layers of the LSTM.")] = _TRAIN[
        "num_layers"
    ],
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Of Adam.")] = _FIT.learning_rate,
    dropout: Annotated[
        float, typer.Option(min=0.0, max=0.95, help="On the LSTM's inputs and outputs.")
    ] = _TRAIN["dropout"],
    min_count: Annotated[
        int, typer.Option(min=1, help="Words seen less often become <unk>.")
    ] = _TRAIN["min_count"],
    val_share: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of photos held out without --val-cache.")
    ] = _TRAIN["val_share"],
    seed: Annotated[int, typer.Option(min=0)] = _FIT.seed,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saved models.")] = _TRAIN[
        "save_every"
    ],
    log_every: Annotated[int, typer.Option(min=1, help="Steps between log lines.")] = _TRAIN[
        "log_every"
    ],
    device: Device = _TRAIN["device"],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew where a run exists.")
    ] = False,
) -> None:
    """Train a captioning model on cached features.

    Example: cap train --from-cache train.h5 --out runs/base
    """
    with errors(f"the model so far is in {out}; go on with --resume"):
        from train.run import EpochLog, Saved, Started, StepLog
        from train.run import train as run_training

        config = TrainConfig(
            from_cache=from_cache,
            out=out,
            val_cache=val_cache,
            val_share=val_share,
            embedding_size=embedding_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            dropout=dropout,
            min_count=min_count,
            fit=FitConfig(
                epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed
            ),
            save_every=save_every,
            log_every=log_every,
            device=device,
            resume=resume,
            overwrite=overwrite,
        )
        best = None
        with _between_steps() as interrupted, contextlib.closing(run_training(config)) as reports:
            for report in reports:
                match report:
                    case Started():
                        say(report.summary())
                    case StepLog():
                        say(report.line())
                    case EpochLog():
                        say(report.line())
                        best = report.best_val_loss
                    case Saved():
                        say(f"saved {report.path}")
                if interrupted():
                    raise KeyboardInterrupt
        loss = f" (validation loss {best:.4f})" if best is not None else ""
        print(f"{out / 'best.cap'}{loss}")


@contextlib.contextmanager
def _between_steps() -> Iterator[Any]:
    """Hold a first Ctrl-C back until the caller asks: a step is done or not done, never half.

    A second Ctrl-C interrupts at once.
    """
    pressed = False

    def press(signum: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
