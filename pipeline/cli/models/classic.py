"""The command that makes a model of somebody else's run: import-classic."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.errors import errors
from pipeline.cli.options import Json
from pipeline.cli.terminal import one_line, print_json, say


def import_classic(
    encoder_file: Annotated[
        Path, typer.Option("--encoder", help="The tutorial's encoder-….ckpt, a state dict.")
    ],
    decoder_file: Annotated[
        Path, typer.Option("--decoder", help="The decoder-….ckpt that was saved with it.")
    ],
    vocab_file: Annotated[
        Path, typer.Option("--vocab", help="Its vocab.pkl, a pickle, which can run nothing here.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the model and its weights into.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that is there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a model of a finished run of the CNN-LSTM tutorial.

    That is the image captioning of yunjey's pytorch-tutorial, with any ResNet, of any sizes. The
    model is for `cap predict` and `cap evaluate`; training cannot go on from it.

    Example: cap import-classic --encoder encoder-5-3236.ckpt --decoder decoder-5-3236.ckpt
    --vocab vocab.pkl --out runs/old
    """
    with errors("nothing was imported; run the same command again"):
        from pipeline.inspection.classic.model import import_classic as run_import

        found = run_import(encoder_file, decoder_file, vocab_file, out, overwrite=overwrite)
        for notice in found.notices:
            say(one_line(notice))
        say(
            "to score it, make a cache with `cap extract-features` and --backbone "
            f"{found.encoder.backbone} --weights {one_line(shlex.quote(str(found.weights)))} "
            f"--precision {found.encoder.precision}"
        )
        if as_json:
            print_json(found.as_dict())
        else:
            print(one_line(found.summary()))
