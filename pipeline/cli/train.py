"""The commands from a cache to a model: build-vocab, train."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import Device, Json, defaults, errors, one_of, print_json
from pipeline.cli.terminal import say
from train.config import (
    DECAYS,
    RECIPES,
    SAVE_EVERY,
    SAVE_PAUSE_S,
    SELECT_BY,
    Recipe,
    TrainConfig,
)

_TRAIN = defaults(TrainConfig)


def _recipe(text: str, name: str, **bounds: Any) -> Any:
    """An option that changes one number of the recipe; its help shows each recipe's own."""
    values = ", ".join(f"{recipe}: {getattr(RECIPES[recipe], name)}" for recipe in RECIPES)
    return typer.Option(help=f"{text}  [{values}]", **bounds)


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
        from pipeline.vocabulary_report import vocabulary_report

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
    recipe: Annotated[
        str,
        typer.Option(help="best, or classic: the CNN-LSTM tutorials' training. Options below win."),
    ] = "best",
    epochs: Annotated[int | None, _recipe("Times through all captions.", "epochs", min=1)] = None,
    batch_size: Annotated[int | None, _recipe("Captions a step.", "batch_size", min=1)] = None,
    embedding_size: Annotated[
        int | None, _recipe("Of words and of the projected photo.", "embedding_size", min=1)
    ] = None,
    hidden_size: Annotated[int | None, _recipe("Of the LSTM.", "hidden_size", min=1)] = None,
    num_layers: Annotated[int | None, _recipe("Of the LSTM.", "num_layers", min=1)] = None,
    learning_rate: Annotated[
        float | None, _recipe("Of AdamW, at its highest.", "learning_rate", min=0.0)
    ] = None,
    warmup: Annotated[
        float | None,
        _recipe("Share of the steps in which it rises to that.", "warmup", min=0.0, max=1.0),
    ] = None,
    decay: Annotated[
        str | None, _recipe("Then: constant, or cosine, which falls to 0.", "decay")
    ] = None,
    weight_decay: Annotated[
        float | None, _recipe("Of AdamW, on matrices.", "weight_decay", min=0.0)
    ] = None,
    clip_norm: Annotated[
        float | None, _recipe("Of all gradients together, at most.", "clip_norm", min=1e-6)
    ] = None,
    average_decay: Annotated[
        float | None,
        _recipe(
            "A step's share that the moving average of the weights keeps; 0: no average.",
            "average_decay",
            min=0.0,
            max=0.999999,
        ),
    ] = None,
    dropout: Annotated[
        float | None,
        _recipe("On the LSTM's inputs and outputs.", "dropout", min=0.0, max=0.95),
    ] = None,
    feature_dropout: Annotated[
        float | None,
        _recipe("On the photo's features.", "feature_dropout", min=0.0, max=0.95),
    ] = None,
    label_smoothing: Annotated[
        float | None,
        _recipe("Share of each target spread over all words.", "label_smoothing", min=0, max=0.9),
    ] = None,
    scheduled_sampling: Annotated[
        float | None,
        _recipe(
            "Share of input words, at the end, that the model chose itself.",
            "scheduled_sampling",
            min=0.0,
            max=1.0,
        ),
    ] = None,
    self_critical_epochs: Annotated[
        int | None,
        _recipe("Then so many rewarded by CIDEr-D.", "self_critical_epochs", min=0),
    ] = None,
    self_critical_rate: Annotated[
        float | None, _recipe("Learning rate of those.", "self_critical_rate", min=0.0)
    ] = None,
    self_critical_anchor: Annotated[
        float | None,
        _recipe("Weight of the true captions in those.", "self_critical_anchor", min=0.0),
    ] = None,
    self_critical_photos: Annotated[
        int | None, _recipe("Photos a step of those.", "self_critical_photos", min=1)
    ] = None,
    self_critical_samples: Annotated[
        int | None,
        _recipe("Captions drawn for each of them.", "self_critical_samples", min=2),
    ] = None,
    min_count: Annotated[
        int, typer.Option(min=1, help="Words seen less often become <unk>.")
    ] = _TRAIN["min_count"],
    val_share: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="Share of photos held out without --val-cache.")
    ] = _TRAIN["val_share"],
    select_by: Annotated[
        str,
        typer.Option(
            help="What makes a model the best, on validation photos: cider (of greedy captions), "
            "beam (CIDEr of beam search) or loss."
        ),
    ] = _TRAIN["select_by"],
    patience: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after so many epochs without a better model."),
    ] = _TRAIN["patience"],
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = _TRAIN["seed"],
    save_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Steps between saved models.  [default: {SAVE_EVERY}, "
            f"not within {SAVE_PAUSE_S:.0f} s of the last]",
        ),
    ] = _TRAIN["save_every"],
    log_every: Annotated[int, typer.Option(min=1, help="Steps between log lines.")] = _TRAIN[
        "log_every"
    ],
    device: Device = _TRAIN["device"],
    precision: Annotated[
        str,
        typer.Option(
            help="Of the products: auto (bfloat16 where that is fast), float32, bfloat16."
        ),
    ] = _TRAIN["precision"],
    plain: Annotated[
        bool, typer.Option("--plain", help="Use the slow, readable reference computation.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out; its options again.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew where a run exists.")
    ] = False,
) -> None:
    """Train a captioning model on cached features.

    Example: cap train --from-cache train.h5 --out runs/base
    """
    started = False

    def kept() -> str:
        if started:
            return f"the model so far is in {out}; go on with --resume"
        return "training had not begun; run the same command again"

    with errors(kept):
        from train.fit.reports import EpochLog, Saved, Started, StepLog
        from train.fit.run import train as run_training

        one_of("--recipe", recipe, tuple(RECIPES))
        one_of("--select-by", select_by, SELECT_BY)
        one_of("--precision", precision, ("auto", "float32", "bfloat16"))
        if decay is not None:
            one_of("--decay", decay, DECAYS)
        config = TrainConfig(
            from_cache=from_cache,
            out=out,
            recipe=_changed(
                RECIPES[recipe],
                epochs=epochs,
                batch_size=batch_size,
                embedding_size=embedding_size,
                hidden_size=hidden_size,
                num_layers=num_layers,
                learning_rate=learning_rate,
                warmup=warmup,
                decay=decay,
                weight_decay=weight_decay,
                clip_norm=clip_norm,
                average_decay=average_decay,
                dropout=dropout,
                feature_dropout=feature_dropout,
                label_smoothing=label_smoothing,
                scheduled_sampling=scheduled_sampling,
                self_critical_epochs=self_critical_epochs,
                self_critical_rate=self_critical_rate,
                self_critical_anchor=self_critical_anchor,
                self_critical_photos=self_critical_photos,
                self_critical_samples=self_critical_samples,
            ),
            val_cache=val_cache,
            val_share=val_share,
            select_by=select_by,
            patience=patience,
            min_count=min_count,
            seed=seed,
            save_every=save_every,
            log_every=log_every,
            device=device,
            precision=precision,
            plain=plain,
            resume=resume,
            overwrite=overwrite,
        )
        best = None
        with _between_steps() as interrupted, contextlib.closing(run_training(config)) as reports:
            for report in reports:
                match report:
                    case Started():
                        started = True
                        say(report.summary())
                    case StepLog():
                        say(report.line())
                    case EpochLog():
                        say(report.line())
                        best = report if report.best else best
                    case Saved():
                        say(f"saved {report.path}")
                if interrupted():
                    raise KeyboardInterrupt
        scores = (
            f" (epoch {best.epoch}: validation loss {best.val_loss:.4f}, "
            f"CIDEr {100 * best.cider:.1f})"
            if best is not None
            else ""
        )
        print(f"{out / 'best.cap'}{scores}")


def _changed(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with the numbers that were given."""
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(recipe, **given)


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
