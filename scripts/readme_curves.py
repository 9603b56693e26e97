"""Draw docs/images/curves.png, the README's picture: the curves of the demo's own training.

    python scripts/readme_curves.py --demo demo

--demo: the folder of `cap demo`, which runs there first if it has not been run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cache.errors import CapError
from pipeline.demo.config import DemoConfig
from pipeline.demo.run import run_demo
from train.fit.record.curves import draw_run

_PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "curves.png"
_LARGEST_BYTES = 150_000


def main(demo: Annotated[Path, typer.Option(help="Folder of the demo.")] = Path("demo")) -> None:
    """Run the demo if need be, and draw."""
    try:
        if not (demo / "run" / "best.cap").exists():
            for report in run_demo(DemoConfig(out=demo)):
                print(report if isinstance(report, str) else report.summary(), file=sys.stderr)
        _PICTURE.parent.mkdir(exist_ok=True)
        if not draw_run(demo / "run", _PICTURE):
            raise CapError(f"{demo}/run: its log is empty; run the demo again in another folder")
    except CapError as error:
        sys.exit(f"error: {error}")
    size = _PICTURE.stat().st_size
    if size > _LARGEST_BYTES:
        sys.exit(f"error: {_PICTURE}: {size:,} bytes, more than {_LARGEST_BYTES:,}")
    print(f"{_PICTURE} ({size:,} bytes)")


if __name__ == "__main__":
    typer.run(main)
