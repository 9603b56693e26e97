"""Photos of a folder as tars and as Parquet files."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest


def write_tar(
    path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def photos_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jpg"))


def captions_of(name: str) -> list[str]:
    """What `captions.txt` of the fixture `photos` says of a photo."""
    letter = name.removesuffix(".jpg")
    return [f"A photo, number {letter}, of coarse noise .", f"Noise {letter} ."]


def as_tars(folder: Path, out: Path, *, parts: int = 2, texts: str | None = ".txt") -> str:
    """Write the photos of a folder into tars, with their captions in members; their pattern."""
    photos = photos_of(folder)
    size = -(-len(photos) // parts)
    out.mkdir(parents=True, exist_ok=True)
    for number in range(parts):
        members = []
        for photo in photos[number * size : (number + 1) * size]:
            members.append((photo.name, photo.read_bytes()))
            captions = captions_of(photo.name)
            if texts == ".txt":
                members.append((f"{photo.stem}.txt", "\n".join(captions).encode()))
            elif texts == ".json":
                record = {"key": photo.stem, "url": f"http://x/{photo.name}", "captions": captions}
                members.append((f"{photo.stem}.json", json.dumps(record).encode()))
        write_tar(out / f"photos-{number:03d}.tar", members)
    return str(out / f"photos-{{000..{parts - 1:03d}}}.tar")


def as_parquet(folder: Path, out: Path, *, rows: int = 5) -> Path:
    """Write the photos of a folder into a Parquet file as Hugging Face's datasets do."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    photos = photos_of(folder)
    table = arrow.table(
        {
            "image": [{"bytes": photo.read_bytes(), "path": photo.name} for photo in photos],
            "caption": [captions_of(photo.name) for photo in photos],
            "width": list(range(len(photos))),
        }
    )
    parquet.write_table(table, out, row_group_size=rows)
    return out
