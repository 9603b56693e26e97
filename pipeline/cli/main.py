"""The start and the end of the `cap` process."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import warnings
from dataclasses import dataclass

from pipeline.cli.process import OutputError, abandon_stdout, leave_at_once, open_streams
from pipeline.cli.training.together import only_the_first_speaks
from train.torch_import import share_machine


def main() -> None:
    """Run the command line."""
    leave_at_once()
    open_streams()
    share_machine()
    # About odd metadata and large photos. What matters of that becomes a photo's reason.
    warnings.filterwarnings("ignore", module=r"PIL|pillow_heif")
    ending = _Ending()
    # Exit handlers run in reverse order: this one runs after those that later imports register.
    atexit.register(ending.end)
    from pipeline.cli.app import app  # most of the start-up time goes into this import

    try:
        try:
            with only_the_first_speaks():
                app()
        finally:
            sys.stdout.flush()  # here, because at the interpreter's end a failure has no name
    except SystemExit as end:
        ending.code = end.code or 0 if isinstance(end.code, int | None) else 1
        raise
    except OutputError as error:  # outside of a command, as in `cap --help`
        abandon_stdout(error)
        sys.exit(1)


@dataclass
class _Ending:
    """Ends a process that has imported PyTorch without the interpreter's own ending.

    That takes up to a second, to dismantle PyTorch and the GPU's context, which the system takes
    back anyway. Everything is written by then: threads have ended, and exit handlers have run.
    """

    code: int | None = None  # None: not by this module's doing, so in the usual way

    def end(self) -> None:
        # An error after `main`, in a program that calls it, is told in the usual way too.
        if self.code is None or hasattr(sys, "last_value") or "torch" not in sys.modules:
            return
        with contextlib.suppress(OSError, OutputError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(self.code)
