"""The start of the `cap` process."""

from __future__ import annotations

import sys
import warnings

from pipeline.cli.process import OutputError, abandon_stdout, leave_at_once, open_streams
from train.torch_import import spin_briefly


def main() -> None:
    """Run the command line."""
    leave_at_once()
    open_streams()
    spin_briefly()
    # About odd metadata and large photos. What matters of that becomes a photo's reason.
    warnings.filterwarnings("ignore", module=r"PIL|pillow_heif")
    from pipeline.cli.app import app  # most of the start-up time goes into this import

    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, because at the interpreter's end a failure has no name
    except OutputError as error:  # outside of a command, as in `cap --help`
        abandon_stdout(error)
        sys.exit(1)
