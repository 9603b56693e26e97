"""What a `cap` process sets up before its command begins: Ctrl-C and the standard streams.

Until the command begins, Ctrl-C ends the process without a word, because there is nothing to keep
yet. There is always something to write to, any text can be written, and a failure names itself.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from io import TextIOWrapper

from cache.errors import CapError
from pipeline.cli.terminal import complain

_AS_BYTES = "cap-as-bytes"  # the error handler below


class OutputError(CapError):
    """Raised when standard output cannot be written.

    The message is one line. It is empty if whoever read the output has stopped reading, as in
    `cap predict … | head`.
    """


def leave_at_once() -> None:
    """Until `command_begins`, Ctrl-C ends the process with exit code 130 and without a word."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _leave)


def command_begins() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def open_streams() -> None:
    """Prepare stdout and stderr, also where the process was started without them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file that is opened would get this number, and a library that writes to
            # stderr would write into that file. `open` takes the lowest free number: this one.
            os.open(os.devnull, os.O_RDWR)
    # Python has None for a stream that is closed when it starts. The types do not say so.
    stdout: object = sys.stdout
    stderr: object = sys.stderr
    if stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        codecs.register_error(_AS_BYTES, _as_bytes)
        old = sys.stdout
        encoding, at_once, through = old.encoding, old.line_buffering, old.write_through
        sys.stdout = _Results(
            old.detach(), encoding, _AS_BYTES, line_buffering=at_once, write_through=through
        )


def abandon_stdout(error: OutputError) -> None:
    """After stdout has failed: say so, and send to nowhere what is still to be written to it."""
    if str(error):
        complain(f"error: {error}")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


class _Results(TextIOWrapper):
    """Standard output whose failures are OutputErrors."""

    def write(self, text: str) -> int:
        with _named_failure():
            return super().write(text)

    def flush(self) -> None:
        with _named_failure():
            super().flush()


@contextlib.contextmanager
def _named_failure() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise OutputError("") from None
    except OSError as error:
        raise OutputError(f"standard output: cannot write ({error.strerror or error})") from None


def _as_bytes(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write a file's name as the bytes it has, and other characters that stdout's encoding lacks as
    `\\u2026`.
    """
    assert isinstance(error, UnicodeEncodeError)
    error.end = error.start + 1  # the next character may be of the other kind
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(error)


def _leave(signum: int, frame: object) -> None:
    os._exit(130)
