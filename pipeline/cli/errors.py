"""What the commands share: their common options, and errors turned into messages and exit codes.

Results go to stdout, everything else to stderr. Exit codes: 0 done; 1 an error the user can mend
(one line on stderr); 2 wrong arguments; 130 interrupted.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from cache.errors import CapError
from pipeline.cli.interrupts import command_begins
from pipeline.cli.terminal import say
from train.config import SearchConfig, SearchError, check_search

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
BeamSize = Annotated[int, typer.Option(min=1, help="Captions kept in search; 1 is greedy.")]
MaxLength = Annotated[int, typer.Option(min=1, help="Words of a caption at most.")]
LengthPenalty = Annotated[
    float, typer.Option(min=0.0, help="0 prefers short captions, 1 compares the mean per word.")
]
NoRepeatNgram = Annotated[
    int, typer.Option(min=0, help="Never so many words in a row twice; 0 lets them.")
]
Groups = Annotated[
    int, typer.Option(min=1, help="Share the beam among groups that avoid each other's words.")
]
Diversity = Annotated[
    float, typer.Option(min=0.0, help="Log-probability a word costs if an earlier group said it.")
]
Sample = Annotated[bool, typer.Option("--sample", help="Draw words instead of searching.")]
Temperature = Annotated[
    float, typer.Option(help="Of --sample: above 0; below 1 keeps to likely words.")
]
TopP = Annotated[
    float,
    typer.Option(help="--sample among the likeliest words of this share: above 0, at most 1."),
]
SearchSeed = Annotated[int, typer.Option("--seed", min=0, help="Of --sample.")]
View = Annotated[
    str,
    typer.Option(
        help="full: the whole photo; mean: of all the encoder's views; auto: the model's."
    ),
]
Model = Annotated[Path, typer.Option(help="A run folder or a .cap file.")]


def defaults(config: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config)}


# torch and torchvision make 300,000 objects that stay. Python's default of looking for cycles after
# every 700 new ones walks them over and over, and once more at the end: a fifth of the time from
# the prompt to a photo's caption.
_OBJECTS_BETWEEN_COLLECTIONS = 100_000


@contextlib.contextmanager
def errors(kept: str | Callable[[], str] = "") -> Iterator[None]:
    """Around every command: turn errors into one line and exit code 1, Ctrl-C into `kept` and exit
    code 130.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS, *thresholds[1:])
    atexit.register(gc.freeze)  # what is left at the end needs no last walk
    atexit.register(_end_at_once)  # now, so that whatever else is to be done at the end comes first
    interrupted = False
    try:
        command_begins()
        yield
    except CapError as error:
        say(f"error: {error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        interrupted = True
        kept = kept() if callable(kept) else kept
        say(f"interrupted{'; ' + kept if kept else ''}")
        raise typer.Exit(130) from None
    except BrokenPipeError:  # `cap predict … | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    finally:
        gc.set_threshold(*thresholds)
        if not interrupted:
            atexit.unregister(_end_at_once)


def _end_at_once() -> None:
    """All is saved and said; to take torch apart costs the interpreter most of a second more."""
    sys.stdout.flush()
    os._exit(130)


def print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=1), flush=True)


def search_config(**settings: Any) -> SearchConfig:
    """Raises BadParameter where the settings do not fit one another."""
    config = SearchConfig(**settings)
    try:
        check_search(config)
    except SearchError as error:
        raise typer.BadParameter(str(error)) from None
    return config


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise typer.BadParameter(f"{value!r} is not {' or '.join(allowed)}", param_hint=option)
