"""The commands that score captions: evaluate, demo."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from pipeline.cli.arguments.scoring import check_what_is_scored
from pipeline.cli.arguments.search import searched
from pipeline.cli.errors import errors
from pipeline.cli.options import (
    CaptionColumn,
    Device,
    Gallery,
    ImageColumn,
    Json,
    Sheet,
    choice,
    options,
)
from pipeline.cli.terminal import ProgressLine, print_json, say, say_all
from pipeline.demo.config import DemoConfig
from train.captions.script import TOKENIZER_HELP, TOKENIZERS
from train.config import SearchConfig
from train.torch_import import start_torch

_SOON_S = 3.0  # what takes longer shows how far it is


@options
def evaluate(
    *,
    model: Annotated[Path | None, typer.Option(help="A run folder or a .cap file.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Cache of photos with captions.")] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Score this file, in COCO's results format, instead of a model."),
    ] = None,
    human: Annotated[
        bool,
        typer.Option("--human", help="Score people: each caption against the photo's others."),
    ] = False,
    captions: Annotated[
        list[Path] | None,
        typer.Option(
            help="Captions file with the references, in place of --cache; not for a model. "
            "Several if given several times.",
            metavar="<path>",
        ),
    ] = None,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    split: Annotated[
        str | None, typer.Option(help="Splits of the captions file, comma-separated.")
    ] = None,
    only: Annotated[
        Path | None,
        typer.Option(help="Score only the photos named in this file, one per line."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        choice(f"{TOKENIZER_HELP} Only for --captions.  [default: treebank]", TOKENIZERS),
    ] = None,
    all_photos: Annotated[
        bool,
        typer.Option("--all", help="Refuse --predictions that leave out photos with references."),
    ] = False,
    search: SearchConfig,
    no_meteor: Annotated[
        bool, typer.Option("--no-meteor", help="Leave out METEOR, which takes most of the time.")
    ] = False,
    no_spice: Annotated[
        bool, typer.Option("--no-spice", hidden=True, help="Of earlier versions; no effect.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for a model's scores and captions.  [default: the model's]"),
    ] = None,
    gallery: Gallery = None,
    sheet: Sheet = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the cache's photos, for --gallery and --sheet.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score the captions of a model, a file or people.

    The scores are BLEU, METEOR, ROUGE-L and CIDEr.

    Example: cap evaluate --model runs/base --cache val.h5
    """
    searches = search != SearchConfig()
    search = searched(search)
    del no_spice  # nothing computes SPICE any more
    check_what_is_scored(
        model=model,
        predictions=predictions,
        human=human,
        cache=cache,
        captions=captions,
        of_captions=split or image_column or caption_column,
        tokenizer=tokenizer,
        all_photos=all_photos,
        out=out,
        gallery=gallery,
        sheet=sheet,
        images=images,
        searches=searches,
    )
    with errors(), contextlib.ExitStack() as stack:
        start_torch(device if model is not None else "cpu")
        from pipeline.evaluation import evaluate as stage

        shown, others, sheet_of = None, 0, None
        if sheet is not None and images is not None and cache is not None:
            from pipeline.gallery.sheet.of_evaluation import EvaluationSheet

            of_file = predictions is not None
            sheet_of = EvaluationSheet(sheet, images, cache, only, of_file=of_file)
        if gallery is not None and images is not None and cache is not None:
            from pipeline.gallery.of_evaluation import EvaluationGallery
            from pipeline.gallery.of_predictions import others_of

            others = others_of(search)
            shown = stack.enter_context(EvaluationGallery(gallery, images, cache))
        if model is not None and cache is not None:
            with ProgressLine("captioning", "photos", after_s=_SOON_S) as line:
                result = stage.evaluate(
                    model,
                    cache,
                    search,
                    out=out,
                    only=only,
                    device=device,
                    meteor=not no_meteor,
                    report=line.update_timed,
                    others=others,
                )
            say_all(result.scores.notices)
            _show(result, as_json)
            if shown is not None:
                with ProgressLine("gallery", "photos", after_s=_SOON_S) as line:
                    report = line.update_timed
                    whole = only is None
                    said = shown.write_model(result, model, search, whole=whole, report=report)
                say(said)
            if sheet_of is not None:
                with ProgressLine("sheet", "photos", after_s=_SOON_S) as line:
                    lines = sheet_of.write_model(result, model, report=line.update_timed)
                say_all(lines)
            if result.problem is not None:  # the scores are shown all the same
                raise result.problem
            say(f"written to {result.scores_file} and {result.predictions_file}")
            return
        references: dict[str, Any] = {
            "cache": cache,
            "captions": captions,
            "split": split,
            "only": only,
            "tokenizer": tokenizer,
            "image_column": image_column,
            "caption_column": caption_column,
        }
        scoring: dict[str, Any] = {"meteor": not no_meteor, "say": say}
        if predictions is not None:
            scored = stage.evaluate_predictions(
                predictions, all_photos=all_photos, **references, **scoring
            )
            say_all(scored.scores.notices)
            _show(scored, as_json)
            if shown is not None:
                with ProgressLine("gallery", "photos", after_s=_SOON_S) as line:
                    said = shown.write_file(scored, predictions, report=line.update_timed)
                say(said)
            if sheet_of is not None:
                with ProgressLine("sheet", "photos", after_s=_SOON_S) as line:
                    lines = sheet_of.write_file(scored, predictions, report=line.update_timed)
                say_all(lines)
        else:
            people = stage.evaluate_people(**references, **scoring)
            say_all(people.notices)
            _show(people, as_json)


class _Shown(Protocol):
    def as_dict(self) -> dict[str, Any]: ...
    def summary(self) -> str: ...


def _show(result: _Shown, as_json: bool) -> None:
    if as_json:
        print_json(result.as_dict())
    else:
        print(result.summary())


@options
def demo(*, config: DemoConfig, as_json: Json = False) -> None:
    """Run the whole job on drawn scenes.

    Draws scenes, extracts their features, trains, evaluates and predicts. Downloads nothing.

    Example: cap demo --out demo
    """
    with errors(f"start again with `cap demo --out {config.out}`"):
        start_torch(config.device)
        from pipeline.demo.run import run_demo

        for report in run_demo(config):
            if isinstance(report, str):
                say(report)
            elif as_json:
                print_json(report.as_dict())
            else:
                print(report.summary())
