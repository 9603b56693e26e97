"""What the commands share: their common options, and errors turned into messages and exit codes.

Results go to stdout, everything else to stderr. Exit codes: 0 done; 1 an error the user can mend
(one line on stderr); 2 wrong arguments; 130 interrupted.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from cache.errors import CapError
from pipeline.terminal import say

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
BeamSize = Annotated[int, typer.Option(min=1, help="Captions kept in search; 1 is greedy.")]
Model = Annotated[Path, typer.Option(help="A run folder or a .cap file.")]


def defaults(config: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config)}


@contextlib.contextmanager
def errors(kept: str | Callable[[], str] = "") -> Iterator[None]:
    """Turn errors into one line and exit code 1, Ctrl-C into `kept` and exit code 130."""
    atexit.register(_end_at_once)  # now, so that whatever else is to be done at the end comes first
    interrupted = False
    try:
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
        if not interrupted:
            atexit.unregister(_end_at_once)


def _end_at_once() -> None:
    """All is saved and said; to take torch apart costs the interpreter most of a second more."""
    sys.stdout.flush()
    os._exit(130)


def print_json(value: object) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=1), flush=True)
