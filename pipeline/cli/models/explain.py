"""The command that shows what the words of a caption depend on: explain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.errors import errors
from pipeline.cli.options import Device, Json, MovedWeights
from pipeline.cli.terminal import ProgressLine, one_field, print_json, say
from train.torch_import import start_torch

_SOON_S = 3.0  # what takes longer shows how far it is
_GRID = 7  # `pipeline.captioner.explanation.GRID`; that module is heavy


def explain(
    *,
    photo: Annotated[Path, typer.Argument(help="A photo.", show_default=False)],
    model: Annotated[Path, typer.Option(help="A run folder or a .cap file.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="PNG to write.  [default: the photo's name with -explained.png, in this folder]"
        ),
    ] = None,
    caption: Annotated[
        str | None, typer.Option(help="Explain this sentence, not the model's own.")
    ] = None,
    words: Annotated[
        str | None, typer.Option(help="Draw only these words of the caption, comma-separated.")
    ] = None,
    grid: Annotated[
        int,
        typer.Option(
            min=3,
            max=32,
            help="Parts of the photo in each direction; a square covers 3 × 3 of them. Finer parts "
            "take longer, and smaller squares cost words less.",
        ),
    ] = _GRID,
    weights: MovedWeights = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw which parts of a photo each word of its caption depends on.

    Parts of the photo are covered one after the other, and the probability of each word is compared
    with that for the whole photo. Prints the name of the picture.

    Example: cap explain dog.jpg --model runs/base
    """
    with errors("no picture was written"):
        start_torch(device)
        from pipeline.captioner.captioner import Captioner
        from pipeline.captioner.explanation import chosen_words, read_pixels
        from pipeline.captioner.explanation import explain as stage
        from pipeline.gallery.explanation import check_replaceable, draw_explanation, make_folder

        picture = Path(f"{photo.stem}-explained.png") if out is None else out
        check_replaceable(picture, photo)
        pixels = read_pixels(photo)
        make_folder(picture)
        captioner = Captioner.load(model, device=device, weights=weights)
        with ProgressLine("covering", "squares", after_s=_SOON_S) as line:
            explanation = stage(
                captioner, pixels, caption=caption, grid=grid, report=line.update_timed
            )
        if explanation.unknown:
            say(f"left out, because the model does not know it: {', '.join(explanation.unknown)}")
        drawn = chosen_words(explanation, words)
        draw_explanation(explanation, drawn, pixels, picture)
        if as_json:
            print_json({"photo": str(photo), "picture": str(picture), **explanation.as_dict()})
        else:
            say(explanation.caption)
            print(one_field(str(picture)), flush=True)
        if caption is None and (doubt := captioner.doubt()) is not None:
            say(f"{model}: its captions mean little ({doubt}), and so does what they depend on")
