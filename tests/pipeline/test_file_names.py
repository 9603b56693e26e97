"""The name of a file is any bytes, and is printed as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, write_photo
from tests.pipeline.test_cli import SMALL, cap


def test_a_name_that_is_not_utf_8_is_printed_in_every_locale(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    write_photo(tmp_path / "photos/a.jpg", 0)
    (tmp_path / "photos" / os.fsdecode(b"\xff.jpg")).write_bytes(b"no photo")
    cache = tmp_path / "x.h5"
    cap("extract-features", "--images", tmp_path / "photos", "--out", cache, *SMALL)
    result = subprocess.run(
        [sys.executable, "-m", "pipeline", "info", str(cache), "--unreadable"],
        capture_output=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},  # as in en_US.UTF-8
    )
    assert b"\xff.jpg\tnot an image" in result.stdout
