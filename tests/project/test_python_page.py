"""The examples of docs/python.md run as they stand, one after the other."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from cache.store import DONE
from tests.conftest import ROOT
from tests.pipeline.test_captioner import trained

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:.*not writable:UserWarning")
def test_the_examples_run(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    cache, run = trained(tmp_path / "photos", tmp_path)
    readable = [cache.paths[row] for row in cache.rows_with(DONE).tolist()]
    shutil.copy(photos / readable[0], tmp_path / "dog.jpg")
    shutil.copy(photos / readable[1], tmp_path / "beach.png")
    run.rename(tmp_path / "mine")
    (tmp_path / "runs").mkdir()
    (tmp_path / "mine").rename(tmp_path / "runs" / "mine")
    # The page's cache has a photo dog.jpg.
    page = PAGE.replace('cache["dog.jpg"]', f'cache["{readable[0]}"]')
    (tmp_path / "x.h5").rename(tmp_path / "photos.h5")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 7
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)  # the page's own code
    said = capsys.readouterr().out
    assert "gone.jpg: file not found" in said
    assert (tmp_path / "runs" / "new" / "best.cap").exists()
