"""The commands that caption: evaluate, predict, demo."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from cache.errors import CapError
from pipeline.cli.errors import (
    BeamSize,
    Device,
    Diversity,
    Groups,
    Json,
    LengthPenalty,
    MaxLength,
    Model,
    NoRepeatNgram,
    Sample,
    SearchSeed,
    Temperature,
    TopP,
    View,
    errors,
    print_json,
    search_config,
)
from pipeline.cli.terminal import say
from pipeline.extraction.config import DemoConfig
from train.config import AUTO, FULL, MEAN, SearchConfig

_SEARCH, _DEMO = SearchConfig(), DemoConfig()


def evaluate(
    model: Annotated[Path | None, typer.Option(help="A run folder or a .cap file.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Cache of photos with captions.")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Score this file in COCO's results format, not a model.")
    ] = None,
    human: Annotated[
        bool, typer.Option("--human", help="Score people: each caption against the others.")
    ] = False,
    captions: Annotated[
        Path | None, typer.Option(help="Captions file in place of --cache, without a model.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Splits of a Karpathy JSON, comma-separated.")
    ] = None,
    only: Annotated[
        Path | None, typer.Option(help="File of photo names of --captions, one a line.")
    ] = None,
    beam_size: BeamSize = _SEARCH.beam_size,
    max_length: MaxLength = _SEARCH.max_length,
    length_penalty: LengthPenalty = _SEARCH.length_penalty,
    no_repeat_ngram: NoRepeatNgram = _SEARCH.no_repeat_ngram,
    groups: Groups = _SEARCH.groups,
    diversity: Diversity = _SEARCH.diversity,
    sample: Sample = _SEARCH.sample,
    temperature: Temperature = _SEARCH.temperature,
    top_p: TopP = _SEARCH.top_p,
    seed: SearchSeed = _SEARCH.seed,
    view: View = _SEARCH.view,
    no_meteor: Annotated[
        bool, typer.Option("--no-meteor", help="Leave METEOR out, which takes most of the time.")
    ] = False,
    no_spice: Annotated[
        bool, typer.Option("--no-spice", help="Leave SPICE out, where it could be computed.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score captions: BLEU, METEOR, ROUGE-L, CIDEr, SPICE; a model's, a file's or people's.

    Example: cap evaluate --model runs/base --cache val.h5
    """
    config = search_config(
        beam_size=beam_size,
        max_length=max_length,
        length_penalty=length_penalty,
        no_repeat_ngram=no_repeat_ngram,
        groups=groups,
        diversity=diversity,
        sample=sample,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        view=_known_view(view),
    )
    _check_what_is_scored(model, predictions, human, cache, captions, split or only)
    with errors():
        from pipeline.evaluation import evaluate as stage

        if model is not None and cache is not None:
            result = stage.evaluate(
                model, cache, config, device=device, meteor=not no_meteor, spice=not no_spice
            )
            _say_all(result.scores.notices)
            say(f"written to {result.scores_file} and {result.predictions_file}")
            _show(result, as_json)
        elif predictions is not None:
            scored = stage.evaluate_predictions(
                predictions,
                cache=cache,
                captions=captions,
                split=split,
                only=only,
                meteor=not no_meteor,
                spice=not no_spice,
            )
            _say_all(scored.scores.notices)
            _show(scored, as_json)
        else:
            people = stage.evaluate_people(
                cache=cache,
                captions=captions,
                split=split,
                only=only,
                meteor=not no_meteor,
                spice=not no_spice,
            )
            _say_all(people.notices)
            _show(people, as_json)


def _check_what_is_scored(
    model: Path | None,
    predictions: Path | None,
    human: bool,
    cache: Path | None,
    captions: Path | None,
    part: object,
) -> None:
    """Raise BadParameter unless one kind of captions meets one kind of references."""
    if (model is not None) + (predictions is not None) + human != 1:
        raise typer.BadParameter("give one of --model, --predictions and --human")
    if model is not None and (cache is None or captions is not None):
        raise typer.BadParameter("a model needs the photos of a --cache (and not --captions)")
    if (cache is None) == (captions is None):
        raise typer.BadParameter("give the references: --cache or --captions, one of them")
    if part is not None and captions is None:
        raise typer.BadParameter("--split and --only choose from --captions")


def _known_view(view: str) -> str:
    if view not in (AUTO, FULL, MEAN):
        raise typer.BadParameter(f"{view!r} is none of {AUTO}, {FULL}, {MEAN}", param_hint="--view")
    return view


def _say_all(notices: Sequence[str]) -> None:
    for notice in notices:
        say(notice)


class _Shown(Protocol):
    def as_dict(self) -> dict[str, Any]: ...
    def summary(self) -> str: ...


def _show(result: _Shown, as_json: bool) -> None:
    if as_json:
        print_json(result.as_dict())
    else:
        print(result.summary())


def predict(
    paths: Annotated[list[str], typer.Argument(help="Photos, folders or globs.")],
    model: Model,
    captions: Annotated[
        int, typer.Option(min=1, help="Captions of each photo, best first, one a line.")
    ] = _SEARCH.captions,
    beam_size: BeamSize = _SEARCH.beam_size,
    max_length: MaxLength = _SEARCH.max_length,
    length_penalty: LengthPenalty = _SEARCH.length_penalty,
    no_repeat_ngram: NoRepeatNgram = _SEARCH.no_repeat_ngram,
    groups: Groups = _SEARCH.groups,
    diversity: Diversity = _SEARCH.diversity,
    sample: Sample = _SEARCH.sample,
    temperature: Temperature = _SEARCH.temperature,
    top_p: TopP = _SEARCH.top_p,
    seed: SearchSeed = _SEARCH.seed,
    view: View = _SEARCH.view,
    weights: Annotated[
        str | None, typer.Option(help="Where the backbone's weights lie now, if moved.")
    ] = None,
    device: Device = "auto",
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print a JSON object a photo, with each word's log-probability."
        ),
    ] = False,
) -> None:
    """Caption photos: one line each, path and caption.

    Example: cap predict dog.jpg holidays/ --model runs/base
    """
    config = search_config(
        beam_size=beam_size,
        max_length=max_length,
        length_penalty=length_penalty,
        no_repeat_ngram=no_repeat_ngram,
        captions=captions,
        groups=groups,
        diversity=diversity,
        sample=sample,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        view=_known_view(view),
    )
    with errors():
        from pipeline.captioner import Captioner, find_photos

        names = find_photos(paths)
        if not names:
            raise CapError(f"{' '.join(paths)}: no photos found")
        captioner = Captioner.load(model, device=device, weights=weights, search_config=config)
        failed = 0
        for prediction in captioner.stream(names):
            failed += bool(prediction.error)
            if as_json:
                print(json.dumps(prediction.as_dict(), ensure_ascii=False), flush=True)
            elif prediction.error:
                say(f"error: {prediction.path}: {prediction.error}")
            else:
                for caption in prediction.captions:
                    print(f"{prediction.path}\t{caption.caption}", flush=True)
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
        from pipeline.demo.run import run_demo

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
