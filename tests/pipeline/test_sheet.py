from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.gallery.sheet import Tile, write_contact_sheet
from pipeline.photos.decoding import decode
from tests.conftest import write_photo


@pytest.mark.parametrize("count", [1, 5])
def test_a_contact_sheet_holds_every_photo(tmp_path: Path, count: int) -> None:
    for seed in range(count):
        write_photo(tmp_path / f"{seed}.jpg", seed, (640, 300))
    tiles = [Tile(tmp_path / f"{s}.jpg", "a caption " * 12, "truth") for s in range(count)]
    write_contact_sheet(tiles, tmp_path / "sheet.png", legend=("black", "grey"), columns=3)
    sheet = decode((tmp_path / "sheet.png").read_bytes())
    assert sheet.shape[1] > 3 * 320
    assert sheet.std() > 20
