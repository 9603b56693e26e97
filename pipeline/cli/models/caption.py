"""The commands that caption photos or score captions: evaluate, predict, demo."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from cache.errors import CapError
from pipeline.cli.arguments.scoring import check_what_is_scored
from pipeline.cli.errors import WrongArguments, errors
from pipeline.cli.options import (
    CaptionColumn,
    Device,
    Gallery,
    ImageColumn,
    Json,
    MovedWeights,
    OwnBackbone,
    choice,
    options,
    own_or_moved,
)
from pipeline.cli.terminal import ProgressLine, complain, one_field, one_line, print_json, say
from pipeline.demo.config import DemoConfig
from train.captions.script import TOKENIZER_HELP, TOKENIZERS
from train.config import SearchConfig, SearchError, check_search, with_enough_beams
from train.torch_import import start_torch

_STDIN = "-"
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
    spice: Annotated[
        bool, typer.Option("--spice", help="Compute SPICE, too; it needs Java 8 to 14 and jars.")
    ] = False,
    no_spice: Annotated[
        bool, typer.Option("--no-spice", hidden=True, help="The default; of earlier versions.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for a model's scores and captions.  [default: the model's]"),
    ] = None,
    gallery: Gallery = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the cache's photos, for --gallery.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score the captions of a model, a file or people.

    The scores are BLEU, METEOR, ROUGE-L, CIDEr and SPICE.

    Example: cap evaluate --model runs/base --cache val.h5
    """
    searches = search != SearchConfig()
    search = _searched(search)
    if spice and no_spice:
        raise WrongArguments("--spice and --no-spice contradict each other; give one of them")
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
        images=images,
        searches=searches,
    )
    with errors(), contextlib.ExitStack() as stack:
        start_torch(device if model is not None else "cpu")
        from pipeline.evaluation import evaluate as stage

        shown, others = None, 0
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
                    spice=spice,
                    report=line.update_timed,
                    others=others,
                )
            _say_all(result.scores.notices)
            _show(result, as_json)
            if shown is not None:
                with ProgressLine("gallery", "photos", after_s=_SOON_S) as line:
                    report = line.update_timed
                    whole = only is None
                    said = shown.write_model(result, model, search, whole=whole, report=report)
                say(said)
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
        scoring: dict[str, Any] = {"meteor": not no_meteor, "spice": spice, "say": say}
        if predictions is not None:
            scored = stage.evaluate_predictions(
                predictions, all_photos=all_photos, **references, **scoring
            )
            _say_all(scored.scores.notices)
            _show(scored, as_json)
            if shown is not None:
                with ProgressLine("gallery", "photos", after_s=_SOON_S) as line:
                    said = shown.write_file(scored, predictions, report=line.update_timed)
                say(said)
        else:
            people = stage.evaluate_people(**references, **scoring)
            _say_all(people.notices)
            _show(people, as_json)


def _searched(search: SearchConfig) -> SearchConfig:
    """The settings with enough beams. Raises WrongArguments if they contradict each other."""
    search, notice = with_enough_beams(search)
    try:
        check_search(search)
    except SearchError as error:
        raise WrongArguments(str(error)) from None
    if notice is not None:
        say(notice)
    return search


def _named(paths: Sequence[str], null: bool) -> list[str]:
    """The paths, with those on standard input in the place of `-`. Raises CapError."""
    named: list[str] = []
    for path in paths:
        if path == _STDIN:
            read = sys.stdin.buffer.read().split(b"\0" if null else b"\n")
            named += [os.fsdecode(name) for name in read if name]
        else:
            named.append(path)
    if not named:
        raise CapError("standard input: no paths")
    for name in named:
        if re.match("https?://", name):
            raise CapError(f"{name}: is an address; download the photo and name the file")
    return named


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


@options
def predict(
    *,
    paths: Annotated[
        list[str], typer.Argument(help="Photos, folders or globs; - for paths on standard input.")
    ],
    model: Annotated[Path, typer.Option(help="A run folder or a .cap file.")],
    captions: Annotated[
        int, typer.Option(min=1, help="Captions per photo, best first, one per line.")
    ] = SearchConfig.captions,
    words: Annotated[
        bool,
        typer.Option("--words", help="Print the model's words, not the sentence made of them."),
    ] = False,
    null: Annotated[
        bool,
        typer.Option(
            "--null", "-0", help="Paths on standard input end in NUL, as of find -print0."
        ),
    ] = False,
    search: SearchConfig,
    backbone: OwnBackbone = None,
    weights: MovedWeights = None,
    device: Device = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per photo, one per line.")
    ] = False,
    log_probs: Annotated[
        bool, typer.Option("--log-probs", help="Add each word's log-probability to --json.")
    ] = False,
    gallery: Gallery = None,
) -> None:
    """Caption photos, one line each: path, tab and caption.

    In a path, a line break is written as \\n, a tab as \\t and a backslash as \\\\.

    Example: cap predict dog.jpg holidays/ --model runs/base
    """
    if words and as_json:
        raise WrongArguments("--json has the words besides the sentence; leave out --words")
    if log_probs and not as_json:
        raise WrongArguments("--log-probs has no effect without --json")
    if null and _STDIN not in paths:
        raise WrongArguments("--null has no effect without - for paths on standard input")
    search = _searched(dataclasses.replace(search, captions=captions))
    weights = own_or_moved(backbone, weights)
    kept = "no gallery was written" if gallery is not None else ""
    with errors(kept), contextlib.ExitStack() as stack:
        start_torch(device)
        from pipeline.captioner.captioner import Captioner
        from pipeline.captioner.photo_names import find_photos

        left_out: list[str] = []
        names = find_photos(_named(paths, null), left_out)
        _say_all(left_out)
        if not names:
            raise CapError(f"{' '.join(paths)}: no photos found")
        shown, others = None, 0
        if gallery is not None:
            from pipeline.gallery.gallery import Gallery as Writer
            from pipeline.gallery.of_predictions import finish, others_of, shown_prediction

            shown, others = stack.enter_context(Writer(gallery)), others_of(search)
        captioner = Captioner.load(
            model, device=device, weights=weights, search_config=search, others=others
        )
        failed = 0
        # On a terminal, the captions themselves are the progress.
        after_s = math.inf if sys.stdout.isatty() else _SOON_S
        with ProgressLine("captioning", "photos", after_s=after_s) as line:
            for done, prediction in enumerate(captioner.stream(names), 1):
                failed += bool(prediction.error)
                if as_json:
                    print_json(prediction.as_dict(log_probs=log_probs), indent=None)
                elif prediction.error:
                    line.say(one_line(f"error: {prediction.path}: {prediction.error}"), complain)
                else:
                    for caption in prediction.captions:
                        text = " ".join(caption.words) if words else caption.caption
                        print(f"{one_field(prediction.path)}\t{text}", flush=True)
                if shown is not None:
                    photo = shown_prediction(prediction, captioner.bundle.vocabulary)
                    shown.add(photo, None if prediction.error else prediction.path)
                line.update_timed(done, len(names))
        if shown is not None:
            say(finish(shown, model, captioner))
        if (doubt := captioner.doubt()) is not None:
            say(
                f"{model}: its captions mean little ({doubt}); train it on more photos or more "
                "captions of each, for more --epochs, or with a stronger --backbone"
            )
        if failed:
            complain(f"{failed:,} of {len(names):,} photos have no caption")
            raise typer.Exit(1)


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
