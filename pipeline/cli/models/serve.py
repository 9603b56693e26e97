"""The command that serves a model over HTTP: serve."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from cache.errors import CapError
from pipeline.captioner.serve.config import ServeConfig
from pipeline.cli.errors import WrongArguments, errors
from pipeline.cli.options import Device, Json, MovedWeights, options
from pipeline.cli.terminal import print_json, say
from train.config import SearchConfig, SearchError, check_search, with_enough_beams
from train.torch_import import start_torch


@options
def serve(
    *,
    model: Annotated[Path, typer.Option(help="A run folder or a .cap file.")],
    alternatives: Annotated[
        int,
        typer.Option(
            min=0, max=50, help="Other captions per photo, at most, that the search has found too."
        ),
    ] = 2,
    config: ServeConfig,
    search: SearchConfig,
    weights: MovedWeights = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Serve a model: a page to try it, and captions as JSON.

    Needs `pip install 'cap[serve]'`. Ctrl-C and SIGTERM answer what is in flight and end it.

    Example: cap serve --model runs/base
    """
    # A search for several captions takes longer and may find another best one. These come free.
    captions = 1 + alternatives if search.sample else 1
    search, notice = with_enough_beams(dataclasses.replace(search, captions=captions))
    try:
        check_search(search)
    except SearchError as error:
        raise WrongArguments(str(error)) from None
    if notice is not None:
        say(notice)
    with errors():
        signal.signal(signal.SIGTERM, _leave)
        try:
            import fastapi  # noqa: F401
            import python_multipart  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError:
            raise CapError(
                "cap serve needs FastAPI, uvicorn and python-multipart; get them with "
                "`pip install 'cap[serve]'`"
            ) from None
        start_torch(device)
        from pipeline.captioner.captioner import Captioner
        from pipeline.captioner.serve.server import bind, serve

        bound = bind(config)  # before the model is loaded, which takes seconds
        captioner = Captioner.load(
            model, device=device, weights=weights, search_config=search, others=alternatives
        )

        def started(address: str) -> None:
            if as_json:
                print_json({"model": os.fspath(model), "address": address}, indent=None)
            else:
                print(f"{model}: {address}", flush=True)

        photos = serve(captioner, config, bound, model=model, started=started)
        say(f"stopped; {photos:,} photos were captioned")


def _leave(signum: int, frame: object) -> None:
    """SIGTERM while the model is loaded. The first process of a container has no default for it."""
    raise SystemExit(0)
