"""Make the pictures of the documentation: a gallery and a sheet of the demo's drawn scenes.

    python scripts/readme_pictures.py                  # runs `cap demo` first, which takes a minute
    python scripts/readme_pictures.py --demo demo      # takes the scenes and the model of that one

    python scripts/readme_pictures.py --only sheet     # needs no Chromium

Writes docs/images/gallery.png, which needs `chromium`, and docs/images/sheet.png.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from cache.errors import CapError
from pipeline.demo.config import DemoConfig
from pipeline.demo.run import run_demo
from pipeline.evaluation.evaluate import evaluate
from pipeline.gallery.of_evaluation import EvaluationGallery
from pipeline.gallery.sheet.of_evaluation import EvaluationSheet
from train.config import SearchConfig

IMAGES = Path(__file__).parent.parent / "docs" / "images"
WINDOW = (1280, 880)
SCENES = 8  # of the sheet
MOST_BYTES = 200_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, help="the folder of a finished `cap demo`")
    parser.add_argument("--only", choices=("gallery", "sheet"), help="make this one alone")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            demo = arguments.demo
            if demo is None:
                demo = Path(temporary) / "demo"
                for report in run_demo(DemoConfig(out=demo)):
                    print(report if isinstance(report, str) else report.summary())
            if arguments.only != "sheet":
                page = gallery_of(demo, Path(temporary) / "gallery")
                photograph(page, IMAGES / "gallery.png")
            if arguments.only != "gallery":
                save_small(sheet_of(demo, Path(temporary) / "sheet.png"), IMAGES / "sheet.png")
    except CapError as error:
        sys.exit(f"error: {error}")


def gallery_of(demo: Path, folder: Path) -> Path:
    """The page of the demo's held-out scenes, in `folder`."""
    cache, run, search = demo / "test.h5", demo / "run", SearchConfig()
    with EvaluationGallery(folder, demo / "test", cache) as gallery:
        result = evaluate(run, cache, search, out=folder.parent, meteor=False, others=2)
        gallery.write_model(result, run, search, whole=True)
    print(f"{result.scores.count} scenes, CIDEr {100 * result.scores.cider:.1f}")
    return folder / "index.html"


def sheet_of(demo: Path, picture: Path) -> Path:
    """A sheet of the demo's first held-out scenes."""
    images = demo / "test"
    names = sorted(file.name for file in images.iterdir())[:SCENES]
    only = picture.with_name("names.txt")
    only.write_text("".join(f"{name}\n" for name in names))
    cache, run = demo / "test.h5", demo / "run"
    sheet = EvaluationSheet(picture, images, cache, only, of_file=False)
    result = evaluate(run, cache, SearchConfig(), out=picture.parent, only=only, meteor=False)
    print("\n".join(sheet.write_model(result, run)))
    return picture


def photograph(page: Path, picture: Path) -> None:
    """A picture of the top of a page, with a palette of 256 colours.

    Raises CapError without Chromium, and as `save_small` does.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise CapError("chromium: not found (on Debian: apt install chromium)")
    shot = page.with_name("shot.png")
    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses it to root
    subprocess.run(
        [
            *(chromium, "--headless", "--disable-gpu", "--hide-scrollbars", *root),
            *(f"--window-size={WINDOW[0]},{WINDOW[1]}", "--virtual-time-budget=5000"),
            *(f"--screenshot={shot}", page.as_uri()),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    save_small(shot, picture)


def save_small(large: Path, picture: Path) -> None:
    """The picture of a file with a palette of 256 colours.

    Raises CapError if it is too large for a repository.
    """
    picture.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(large) as image:
        colours = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        colours.save(picture, "PNG", optimize=True)
    size = picture.stat().st_size
    if size > MOST_BYTES:
        raise CapError(f"{picture}: has {size / 1e3:.0f} kB, more than {MOST_BYTES / 1e3:.0f}")
    print(f"{picture}: {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
