"""The commands that caption: evaluate, predict, demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cache.errors import CapError
from pipeline.cli_options import BeamSize, Device, Json, Model, errors, print_json
from pipeline.config import DemoConfig
from pipeline.terminal import say
from train.config import SearchConfig

_SEARCH, _DEMO = SearchConfig(), DemoConfig()


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
    with errors():
        from pipeline.evaluate import evaluate as run_evaluation

        result = run_evaluation(model, cache, SearchConfig(beam_size=beam_size), device=device)
        for notice in result.scores.notices:
            say(notice)
        say(f"written to {result.scores_file} and {result.predictions_file}")
        if as_json:
            print_json(result.scores.as_dict())
        else:
            print(result.summary())


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
    with errors():
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
    with errors(f"start again with `cap demo --out {out}`"):
        from pipeline.demo import run_demo

        config = DemoConfig(
            out=out, backbone=backbone, weights=weights, epochs=epochs, device=device
        )
        for report in run_demo(config):
            if isinstance(report, str):
                say(report)
            elif as_json:
                print_json(report.as_dict())
            else:
                print(report.summary())
