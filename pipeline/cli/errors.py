"""Errors as one line on stderr and an exit code.

0: done. 1: an error that the user can mend. 2: wrong arguments. 130: interrupted.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator

import typer

from cache.errors import CapError
from pipeline.cli.interrupts import command_begins
from pipeline.cli.terminal import say

# torch and torchvision make 300,000 objects that stay. Python's default, to look for cycles after
# every 700 new objects, walks through them over and over, and once more at the end: this took a
# fifth of the time from the prompt to a photo's caption.
_OBJECTS_BETWEEN_COLLECTIONS = 100_000


@contextlib.contextmanager
def errors(kept: str | Callable[[], str] = "") -> Iterator[None]:
    """Wrap the work of a command: an error ends it with one line and exit code 1, Ctrl-C with
    `kept` (what is kept, and how to continue) and exit code 130.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS, *thresholds[1:])
    atexit.register(gc.freeze)  # spares the last walk, at the end of the process
    # Exit handlers run in reverse order: this one runs after those that later imports register.
    atexit.register(_end_at_once)
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
    except BrokenPipeError:  # `cap predict … | head`: the reader has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    finally:
        gc.set_threshold(*thresholds)
        if not interrupted:
            atexit.unregister(_end_at_once)


def _end_at_once() -> None:
    """After Ctrl-C, when everything is saved and said: skip the interpreter's own ending, which
    takes most of a second to dismantle torch.
    """
    sys.stdout.flush()
    os._exit(130)
