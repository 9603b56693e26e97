"""The command line: parses, calls, prints and translates errors. It holds no logic.

Results go to stdout, everything else to stderr. Exit codes: 0 done; 1 an error the user can mend
(one line on stderr); 2 wrong arguments; 130 interrupted. Heavy imports happen inside the commands,
so that help answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache.errors import CapError
from pipeline.config import DemoConfig, ExtractConfig
from pipeline.terminal import ProgressLine, duration, say
from train.config import FitConfig, SearchConfig, TrainConfig

if TYPE_CHECKING:
    from cache.store import FeatureCache
    from pipeline.extract import Progress

app = typer.Typer(
    help="Turn photos and captions into a captioning model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_LISTED_ERRORS = 20


def _defaults(config: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config)}


_EXTRACT, _TRAIN = _defaults(ExtractConfig), _defaults(TrainConfig)
_FIT, _SEARCH, _DEMO = FitConfig(), SearchConfig(), DemoConfig()

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
BeamSize = Annotated[int, typer.Option(min=1, help="Captions kept in search; 1 is greedy.")]
Model = Annotated[Path, typer.Option(help="A run folder or a .cap file.")]


@contextlib.contextmanager
def _errors(kept: str = "") -> Iterator[None]:
    """Turn errors into one line and exit code 1, Ctrl-C into `kept` and exit code 130."""
    try:
        yield
    except CapError as error:
        say(f"error: {error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        say(f"interrupted{'; ' + kept if kept else ''}")
        raise typer.Exit(130) from None
    except BrokenPipeError:  # `cap predict … | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None


def _print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=1), flush=True)


@app.command("extract-features")
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
    batch_size: Annotated[int, typer.Option(min=1, help="Photos at once.")] = _EXTRACT[
        "batch_size"
    ],
    workers: Annotated[
        int | None, typer.Option(min=1, help="Decoding threads.  [default: one per core]")
    ] = _EXTRACT["workers"],
    device: Device = _EXTRACT["device"],
    precision: Annotated[
        str,
        typer.Option(help="auto (fast where it agrees with float32), float32, bfloat16, float16."),
    ] = _EXTRACT["precision"],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many photos.")
    ] = _EXTRACT["limit"],
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
    kept = f"what is done is kept in {out}; run the same command to go on"
    with _errors(kept):
        from pipeline.encoder import DTYPES
        from pipeline.extract import Notice, extract
        from pipeline.images import parse_views

        try:
            parsed_views = parse_views(views)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--views") from None
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
            _print_json(
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


@app.command()
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
    with _errors():
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
            "library_versions": opened.library_versions,
        }
        if as_json:
            if unreadable:
                facts["errors"] = [{"path": p, "reason": r} for p, r in opened.errors()]
            _print_json(facts)
            return
        for name, value in facts.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {item}" for key, item in value.items())
            elif isinstance(value, tuple):
                value = ",".join(value)
            print(f"{name:<16} {value:,}" if isinstance(value, int) else f"{name:<16} {value}")


@app.command()
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
    with _errors():
        from pipeline.verify import verify_cache

        result = verify_cache(cache, images, sample=sample, weights=weights, device=device)
        for problem in result.problems:
            say(problem)
        if as_json:
            _print_json({**dataclasses.asdict(result), "ok": result.ok})
        else:
            print(result.summary())
        if not result.ok:
            raise typer.Exit(1)


@app.command("build-vocab")
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
    with _errors():
        from pipeline.words import vocabulary_report

        report = vocabulary_report(source, min_count)
        if out is not None:
            report.vocabulary.save(out)
            say(f"written to {out}")
        if as_json:
            _print_json(report.as_dict())
        else:
            print(report.summary())


@app.command()
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
    with _errors(f"the model so far is in {out}; go on with --resume"):
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


@app.command()
def evaluate(
    model: Model,
    cache: Annotated[Path, typer.Option(help="Cache of photos with captions.")],
    beam_size: BeamSize = _SEARCH.beam_size,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Caption a cache's photos and score the captions: BLEU, METEOR, ROUGE-L, CIDEr.

    Example: cap evaluate --model runs/base --cache val.h5
    """
    with _errors():
        from pipeline.evaluate import evaluate as run_evaluation

        result = run_evaluation(model, cache, SearchConfig(beam_size=beam_size), device=device)
        for notice in result.scores.notices:
            say(notice)
        say(f"written to {result.scores_file} and {result.predictions_file}")
        if as_json:
            _print_json(result.scores.as_dict())
        else:
            print(result.summary())


@app.command()
def predict(
    paths: Annotated[list[str], typer.Argument(help="Photos, folders or globs.")],
    model: Model,
    beam_size: BeamSize = _SEARCH.beam_size,
    weights: Annotated[
        str | None, typer.Option(help="Where the backbone's weights lie now, if moved.")
    ] = None,
    device: Device = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a photo and line.")
    ] = False,
) -> None:
    """Caption photos: one line each, path and caption.

    Example: cap predict dog.jpg holidays/ --model runs/base
    """
    with _errors():
        from pipeline.captioner import Captioner, find_photos

        names = find_photos(paths)
        if not names:
            raise CapError(f"{' '.join(paths)}: no photos found")
        captioner = Captioner.load(
            model, device=device, weights=weights, search_config=SearchConfig(beam_size=beam_size)
        )
        failed = 0
        for prediction in captioner.stream(names):
            failed += bool(prediction.error)
            if as_json:
                print(json.dumps(prediction.as_dict(), ensure_ascii=False), flush=True)
            elif prediction.error:
                say(f"error: {prediction.path}: {prediction.error}")
            else:
                print(f"{prediction.path}\t{prediction.caption}", flush=True)
        if failed:
            say(f"{failed:,} of {len(names):,} photos have no caption")
            raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to work in.")] = _DEMO.out,
    backbone: Annotated[str, typer.Option(help="Any torchvision classifier.")] = _DEMO.backbone,
    weights: Annotated[
        str | None,
        typer.Option(help="As for extract-features.  [default: the demo's own, else ImageNet's]"),
    ] = _DEMO.weights,
    epochs: Annotated[int, typer.Option(min=1)] = _DEMO.epochs,
    device: Device = _DEMO.device,
    as_json: Json = False,
) -> None:
    """Run the whole job on drawn scenes: draw, extract, train, evaluate, predict.

    Example: cap demo --out demo
    """
    with _errors(f"start again with `cap demo --out {out}`"):
        from pipeline.demo import run_demo

        config = DemoConfig(
            out=out, backbone=backbone, weights=weights, epochs=epochs, device=device
        )
        for report in run_demo(config):
            if isinstance(report, str):
                say(report)
            elif as_json:
                _print_json(report.as_dict())
            else:
                print(report.summary())
