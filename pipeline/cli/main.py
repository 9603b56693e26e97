"""The start of the `cap` process."""

from __future__ import annotations

from pipeline.cli.interrupts import leave_at_once
from train.openmp import spin_briefly


def main() -> None:
    """Run the command line."""
    leave_at_once()
    spin_briefly()
    from pipeline.cli.app import app  # most of the start-up time goes into this import

    app()
