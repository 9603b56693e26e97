from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.extraction import verify as verification
from pipeline.extraction.verify import verify_cache
from pipeline.photos.photo_file import ReadPhoto, read_photo
from tests.conftest import write_photo
from tests.pipeline.test_extract import run


def test_a_photo_that_vanishes_or_changes_while_it_is_compared_is_a_problem_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at its digest and its encoding. The others are compared all the same."""
    folder = tmp_path / "photos"
    for seed in range(4):
        write_photo(folder / f"{seed}.jpg", seed)
    run(folder, tmp_path / "x.h5", captions=None)

    def read(place: str, *rest: Any, **options: Any) -> ReadPhoto:
        path = Path(place)
        if path.name == "1.jpg":
            path.unlink()
        if path.name == "2.jpg":
            write_photo(path, 9)
        return read_photo(place, *rest, **options)

    monkeypatch.setattr(verification, "read_photo", read)
    result = verify_cache(tmp_path / "x.h5", folder)
    assert result.problems == [
        "1.jpg: file not found (it was there a moment ago)",
        "2.jpg: the photo changes while it is being compared",
    ]
    assert (result.sampled, result.encoded) == (4, 2)
    assert result.worst_cosine is not None
    assert result.worst_cosine > 0.9999
