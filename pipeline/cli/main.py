"""The start of the `cap` process."""

from __future__ import annotations

import sys
import warnings
from io import TextIOWrapper

from pipeline.cli.interrupts import leave_at_once
from train.openmp import spin_briefly


def main() -> None:
    """Run the command line."""
    leave_at_once()
    spin_briefly()
    # About odd metadata and large photos. What matters of that becomes a photo's reason.
    warnings.filterwarnings("ignore", module=r"PIL|pillow_heif")
    if isinstance(sys.stdout, TextIOWrapper):
        # As Python does for the C locale: the name of a file need not be UTF-8.
        sys.stdout.reconfigure(errors="surrogateescape")
    from pipeline.cli.app import app  # most of the start-up time goes into this import

    app()
