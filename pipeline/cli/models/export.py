"""The command that writes a model for other programs: export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.errors import errors
from pipeline.cli.options import Json, MovedWeights, choice, options
from pipeline.cli.terminal import print_json, say
from train.config import SearchConfig
from train.torch_import import start_torch

_FORMATS = ("pt2", "onnx", "hf")  # `pipeline.captioner.export.export.FORMATS`, which is heavy


@options
def export(
    *,
    model: Annotated[Path, typer.Option(help="A run folder or a .cap file.")],
    out: Annotated[Path, typer.Option(help="File or folder to write.")],
    format: Annotated[
        str | None,
        choice(
            "pt2 (torch.export), onnx, or hf (a folder for a model hub).  [default: by the suffix "
            "of --out]",
            _FORMATS,
        ),
    ] = None,
    captions: Annotated[
        int, typer.Option(min=1, help="Captions per photo, best first.")
    ] = SearchConfig.captions,
    search: SearchConfig,
    weights: MovedWeights = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is at --out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a model with its encoder for programs that do not have this one.

    A program takes a photo's pixels, (height, width, 3) of uint8, and gives numbers of words and
    scores. Its search is part of it, with the settings given here.

    Example: cap export --model runs/base --out captioner.pt2
    """
    import dataclasses

    with errors():
        start_torch("cpu")
        from pipeline.captioner.export import export as stage

        kind = format or stage.format_of(out)
        facts = stage.export(
            model,
            out,
            dataclasses.replace(search, captions=captions),
            kind=kind,
            weights=weights,
            overwrite=overwrite,
        )
        if as_json:
            print_json(
                {
                    "out": str(out),
                    "format": kind,
                    **{name: facts[name] for name in ("backbone", "image_size", "views", "search")},
                    "words": len(facts["words"]),
                }
            )
        else:
            say("computes in float32, on any device that reads it")
            print(out)
