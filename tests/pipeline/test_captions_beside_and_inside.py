"""Captions beside and inside photos are read only when asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pipeline.captions.dataset import read_photos
from pipeline.captions.formats.beside import SIDECAR
from pipeline.captions.formats.inside import METADATA
from pipeline.captions.mark import MARK
from pipeline.captions.photos import Photos
from pipeline.captions.records import DatasetError, Photo

XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    'xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description><rdf:Alt>'
    '<rdf:li xml:lang="x-default">{}</rdf:li></rdf:Alt></dc:description>'
    "</rdf:Description></rdf:RDF></x:xmpmeta>"
)


def save(path: Path, *, exif: str = "", xmp: str = "", iptc: bytes = b"") -> None:
    """A small photo with captions inside."""
    path.parent.mkdir(exist_ok=True)
    image = Image.new("RGB", (8, 8))
    described = Image.Exif()
    if exif:
        described[0x010E] = exif
    image.save(path, exif=described, xmp=xmp.encode())
    if iptc:  # Photoshop's segment, after the first two bytes of the JPEG
        record = b"\x1c\x02\x78" + len(iptc).to_bytes(2, "big") + iptc
        block = (
            b"8BIM\x04\x04\0\0"
            + len(record).to_bytes(4, "big")
            + record
            + b"\0" * (len(record) % 2)
        )
        segment = b"Photoshop 3.0\0" + block
        data = path.read_bytes()
        path.write_bytes(
            data[:2] + b"\xff\xed" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]
        )


def read(folder: Path, word: str) -> tuple[Photos, str]:
    said: list[str] = []
    photos = read_photos(folder, Path(word), say=said.append)
    return photos, "\n".join(said)


def test_texts_beside_photos_hold_one_caption_a_line(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.PNG", "c.jpg", "d.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text("A dog runs.\n\nA wet dog.\n")
    (tmp_path / "b.PNG.txt").write_text("Ein Hündchen.", encoding="utf-16")
    (tmp_path / "c.txt").write_text(f"A cow.\n{MARK}: best.cap\n")
    photos, said = read(tmp_path, SIDECAR)
    assert photos == [
        Photo("a.jpg", "a.jpg", ("A dog runs.", "A wet dog.")),
        Photo("b.PNG", "b.PNG", ("Ein Hündchen.",)),
    ]
    assert "1 photos have no text beside them and are left out" in said
    assert "1 photos are left out because this program wrote their captions" in said
    assert [photo.captions for photo in read_photos(tmp_path)] == [()] * 4


def test_a_folder_without_texts_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(DatasetError, match=r"no captions beside the photos .*p1.txt beside p1.jpg"):
        read(tmp_path, SIDECAR)
    with pytest.raises(DatasetError, match="no captions inside the photos"):
        read(tmp_path, METADATA)


def test_captions_inside_photos_are_read(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", iptc="Ein Hündchen.".encode(), exif="OLYMPUS DIGITAL CAMERA")
    save(tmp_path / "b.jpg", xmp=XMP.format("A cat &amp; a dog."), exif="Another text")
    save(tmp_path / "c.jpg", exif="A cow stands.")
    save(tmp_path / "d.jpg", exif="OLYMPUS DIGITAL CAMERA")
    save(tmp_path / "e.jpg")
    (tmp_path / "e.xmp").write_text(XMP.format("A bird."))
    save(tmp_path / "f.jpg", xmp=XMP.format(f"A fish.<!-- {MARK} -->"))
    (tmp_path / "g.jpg").write_bytes(b"no photo")
    photos, said = read(tmp_path, METADATA)
    assert {photo.path: photo.captions for photo in photos} == {
        "a.jpg": ("Ein Hündchen.",),
        "b.jpg": ("A cat & a dog.",),
        "c.jpg": ("A cow stands.",),
        "e.jpg": ("A bird.",),
    }
    assert "2 photos have no caption inside them and are left out" in said
    assert "1 photos are left out because this program wrote their captions" in said


def test_a_text_that_many_photos_have_is_no_caption(tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path / f"{number}.jpg", exif="Summer 2019")
    save(tmp_path / "a.jpg", exif="A dog runs.")
    photos, said = read(tmp_path, METADATA)
    assert [photo.path for photo in photos] == ["a.jpg"]
    assert "4 photos have the text 'Summer 2019', no caption" in said


def test_entities_in_xmp_are_not_expanded(tmp_path: Path) -> None:
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">]>' + XMP.format("&a;&a;")
    save(tmp_path / "a.jpg", xmp=bomb)
    save(tmp_path / "b.jpg", exif="A dog runs.")
    assert [photo.path for photo in read(tmp_path, METADATA)[0]] == ["b.jpg"]
