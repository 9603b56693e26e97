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
from pipeline.cli.process import OutputError, abandon_stdout, command_begins
from pipeline.cli.terminal import complain, one_line


class WrongArguments(typer.BadParameter):
    """Raised for arguments that do not go together: exit code 2.

    A BadParameter says «Invalid value» first, which is right only for a value.
    """

    def format_message(self) -> str:
        return self.message


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
    except OutputError as error:
        abandon_stdout(error)
        raise typer.Exit(1) from None
    except CapError as error:
        complain(f"error: {one_line(str(error))}")
        raise typer.Exit(1) from None
    except OSError as error:
        if error.filename is None:
            raise  # of no file of the user's
        complain(f"error: {one_line(_of_a_file(error))}")
        raise typer.Exit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        complain(f"error: {one_line(_of_memory(error))}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        interrupted = True
        kept = kept() if callable(kept) else kept
        complain(f"interrupted{'; ' + kept if kept else ''}")
        raise typer.Exit(130) from None
    finally:
        gc.set_threshold(*thresholds)
        if not interrupted:
            atexit.unregister(_end_at_once)


def _of_a_file(error: OSError) -> str:
    """What is wrong with a file, where no module has told it with more words: a name that is too
    long, a folder that this user may not enter.
    """
    name = error.filename
    shown = os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else str(name)
    return f"{shown}: cannot be used ({error.strerror or type(error).__name__})"


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    if isinstance(error, MemoryError):
        return True
    if "torch" not in sys.modules:  # only torch has RuntimeErrors of this kind
        return False
    from train.device import is_out_of_memory

    return is_out_of_memory(error)


def _of_memory(error: BaseException) -> str:
    reason = next(iter(str(error).splitlines()), "")
    return f"not enough memory{f' ({reason})' if reason else ''}; ask for less at once"


def _end_at_once() -> None:
    """After Ctrl-C, when everything is saved and said: skip the interpreter's own ending, which
    takes most of a second to dismantle torch.
    """
    with contextlib.suppress(OutputError, OSError):
        sys.stdout.flush()
    os._exit(130)
