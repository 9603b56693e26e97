"""Draw docs/images/explain.png, the README's picture: what a caption of a drawn scene depends on.

    python scripts/readme_explanation.py --demo demo

--demo: the folder of `cap demo`, which runs there first if it has not been run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from cache.errors import CapError
from pipeline.captioner.captioner import Captioner
from pipeline.captioner.explanation import chosen_words, explain, read_pixels
from pipeline.demo.config import DemoConfig
from pipeline.demo.run import run_demo
from pipeline.gallery.explanation import draw_explanation

_PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "explain.png"
_WORDS = "purple,star,to,left,yellow,boat,on,beach"
_LARGEST_BYTES = 200_000


def main(
    demo: Annotated[Path, typer.Option(help="Folder of the demo.")] = Path("demo"),
    words: Annotated[str, typer.Option(help="That are drawn.")] = _WORDS,
    scene: Annotated[int, typer.Option(help="Number of a test scene.")] = 500_006,
) -> None:
    """Run the demo if need be, and draw."""
    try:
        if not (demo / "run" / "best.cap").exists():
            for report in run_demo(DemoConfig(out=demo)):
                print(report if isinstance(report, str) else report.summary(), file=sys.stderr)
        pixels = read_pixels(demo / "test" / f"scene-{scene}.jpg")
        found = explain(Captioner.load(demo / "run", device="cpu"), pixels)
        _PICTURE.parent.mkdir(exist_ok=True)
        draw_explanation(found, chosen_words(found, words), pixels, _PICTURE)
        with Image.open(_PICTURE) as image:
            colours = image.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT)  # dithered
        colours.save(_PICTURE, "PNG", optimize=True)
    except CapError as error:
        sys.exit(f"error: {error}")
    size = _PICTURE.stat().st_size
    if size > _LARGEST_BYTES:
        sys.exit(f"error: {_PICTURE}: {size:,} bytes, more than {_LARGEST_BYTES:,}")
    print(f"{_PICTURE} ({size:,} bytes): {found.caption}")


if __name__ == "__main__":
    typer.run(main)
