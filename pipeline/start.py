"""The `cap` process from its first moment, when a Ctrl-C has nothing to keep and nothing to say."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Run the command line. Until a command begins, Ctrl-C ends the process at once, code 130."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _leave)
    from pipeline.cli import app  # takes most of the time until then

    app()


def command_begins() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(signum: int, frame: object) -> None:
    os._exit(130)
