"""The command that captions photos: predict."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cache.errors import CapError
from pipeline.captions.writing import COCO, JSONL, OutputOptions
from pipeline.cli.arguments.search import searched
from pipeline.cli.errors import WrongArguments, errors
from pipeline.cli.options import (
    Device,
    Gallery,
    MovedWeights,
    OwnBackbone,
    Sheet,
    options,
    own_or_moved,
)
from pipeline.cli.terminal import (
    ProgressLine,
    complain,
    one_field,
    one_line,
    print_json,
    say,
    say_all,
)
from train.config import SearchConfig
from train.torch_import import start_torch

_STDIN = "-"
_SOON_S = 3.0  # what takes longer shows how far it is


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
        bool,
        typer.Option("--log-probs", help="Add each word's log-probability to --json and .jsonl."),
    ] = False,
    outputs: OutputOptions,
    gallery: Gallery = None,
    sheet: Sheet = None,
) -> None:
    """Caption photos, one line each: path, tab and caption.

    In a path, a line break is written as \\n, a tab as \\t and a backslash as \\\\. With --out, the
    captions go to a file instead.

    Example: cap predict dog.jpg holidays/ --model runs/base
    """
    _check(outputs, paths, captions, words=words, null=null, as_json=as_json, log_probs=log_probs)
    outputs = dataclasses.replace(outputs, words=words, log_probs=log_probs)
    weights = own_or_moved(backbone, weights)
    search = searched(dataclasses.replace(search, captions=captions))
    pages = [f"no {name} was written" for name, to in _pages(gallery, sheet) if to is not None]
    kept = [lambda: ""]
    with (
        errors(lambda: "; ".join(filter(None, [kept[0](), *pages]))),
        contextlib.ExitStack() as stack,
    ):
        start_torch(device)
        from pipeline.captioner.captioner import Captioner
        from pipeline.captioner.outputs.outputs import Outputs
        from pipeline.captioner.photo_names import find_photos

        left_out: list[str] = []
        named = _named(paths, null)
        places: dict[str, Any] = {}  # of photos that are no files
        names = find_photos(named, left_out, places)
        if places and (outputs.sidecar or outputs.xmp or gallery or sheet):
            raise CapError(
                f"{next(iter(places))}: --sidecar, --xmp, --gallery and --sheet are for photos "
                "that are files; --out writes the captions of others"
            )
        say_all(left_out)
        if not names:
            raise CapError(f"{' '.join(paths)}: no photos found")
        sheet_of = None
        if sheet is not None:
            from pipeline.gallery.sheet.of_predictions import PredictionSheet

            sheet_of = PredictionSheet(sheet, len(names), model)
        roots = [name for name in named if outputs and os.path.isdir(name)]
        writing = stack.enter_context(Outputs(outputs, names, model, search, roots))
        kept[0] = writing.kept
        shows = gallery is not None or sheet is not None  # all photos, whatever is written already
        wanted = names if shows else writing.wanted(names)
        if len(wanted) < len(names):
            say(f"{len(names) - len(wanted):,} of {len(names):,} photos need no caption any more")
        if not wanted:
            say_all(writing.finish())
            return
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
        prints = outputs.out is None
        after_s = math.inf if prints and sys.stdout.isatty() else _SOON_S
        with ProgressLine("captioning", "photos", after_s=after_s) as line:
            for done, prediction in enumerate(
                captioner.stream([places.get(name, name) for name in wanted]), 1
            ):
                failed += bool(prediction.error)
                writing.write(prediction)
                if as_json:
                    print_json(prediction.as_dict(log_probs=log_probs), indent=None)
                elif prediction.error:
                    line.say(one_line(f"error: {prediction.path}: {prediction.error}"), complain)
                elif prints:
                    for caption in prediction.captions:
                        text = " ".join(caption.words) if words else caption.caption
                        print(f"{one_field(prediction.path)}\t{text}", flush=True)
                if shown is not None:
                    photo = shown_prediction(prediction, captioner.bundle.vocabulary)
                    shown.add(photo, None if prediction.error else prediction.path)
                if sheet_of is not None:
                    sheet_of.add(prediction)
                line.update_timed(done, len(wanted))
        say_all(writing.finish())
        if shown is not None:
            say(finish(shown, model, captioner))
        if sheet_of is not None:
            with ProgressLine("sheet", "photos", after_s=_SOON_S) as line:
                said = sheet_of.finish(report=line.update_timed)
            say_all(said)
        if (doubt := captioner.doubt()) is not None:
            say(
                f"{model}: its captions mean little ({doubt}); train it on more photos or more "
                "captions of each, for more --epochs, or with a stronger --backbone"
            )
        if failed:
            complain(f"{failed:,} of {len(wanted):,} photos have no caption")
            raise typer.Exit(1)


def _pages(gallery: Path | None, sheet: Path | None) -> list[tuple[str, Path | None]]:
    return [("gallery", gallery), ("sheet", sheet)]


def _check(
    outputs: OutputOptions,
    paths: Sequence[str],
    captions: int,
    *,
    words: bool,
    null: bool,
    as_json: bool,
    log_probs: bool,
) -> None:
    """Raise WrongArguments for options that have no effect beside the others."""
    if words and as_json:
        raise WrongArguments("--json has the words besides the sentence; leave out --words")
    if null and _STDIN not in paths:
        raise WrongArguments("--null has no effect without - for paths on standard input")
    if as_json and outputs.out is not None:
        raise WrongArguments("--json is for standard output, and --out takes its place")
    if log_probs and not as_json and outputs.suffix != JSONL:
        raise WrongArguments(f"--log-probs has no effect without --json or --out FILE{JSONL}")
    if words and outputs.suffix == JSONL:
        raise WrongArguments(f"{JSONL} has the words besides the sentence; leave out --words")
    if captions > 1 and outputs.suffix == COCO:
        raise WrongArguments(f"{COCO} has one caption per photo; leave out --captions")
    if outputs.overwrite and not outputs:
        raise WrongArguments("--overwrite has no effect without --out, --sidecar or --xmp")


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
