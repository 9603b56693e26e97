from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from PIL import Image

from pipeline.captioner.photo_names import find_photos
from pipeline.captions.dataset import read_photos
from pipeline.photos.drive.shortages import ShortageError
from pipeline.photos.folder import FolderError, list_photos
from tests.pipeline.test_decoding import saved

PICTURE = Image.new("RGB", (8, 6), "red")
JPEG = saved(PICTURE, "JPEG")


def written(folder: Path, **files: bytes) -> Path:
    """A folder of files; `__` in a name stands for a dot, `_SLASH_` for a slash."""
    for name, data in files.items():
        path = folder / name.replace("_SLASH_", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.mark.parametrize(
    "name",
    ["a.jpg", "A.JPG", "a.jfif", "a.HEIC", "a.mpo", "a.jp2", "a.avif", "a.qoi", "broken.tif"],
)
def test_a_usual_suffix_makes_a_photo_whatever_the_content(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no picture")
    assert list_photos(tmp_path).paths == [name]
    assert list_photos(tmp_path).notice() is None


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("1024", JPEG),
        ("photo of 3.July 2019", JPEG),
        ("a.image", saved(PICTURE, "PNG")),
        ("a.0", saved(PICTURE, "WEBP")),
        ("no suffix", saved(PICTURE, "TIFF")),
        ("a.tga", saved(PICTURE, "TGA")),  # has no signature, but its own suffix
        ("a.pcx", saved(PICTURE, "PCX")),
        ("a.psd", b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\1\0\0\0\1\0\x08\0\3" + bytes(30)),
    ],
)
def test_a_picture_is_a_photo_whatever_its_name(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert list_photos(tmp_path).paths == [name]


@pytest.mark.parametrize(
    ("name", "data", "kind"),
    [
        ("a.jxl", b"\xff\x0a", ".jxl"),
        ("a.CR2", saved(PICTURE, "TIFF"), ".cr2"),  # a thumbnail, where Pillow looks for a picture
        ("a.unknownraw", saved(PICTURE, "TIFF"), ".unknownraw"),
        ("a.txt", b"two dogs", ".txt"),
        ("a.thm", JPEG, ".thm"),  # of a video
        ("a.jpg.part", JPEG, ".part"),
        ("README", b"P1 is the best photo", "without suffix"),
        ("empty", b"", "without suffix"),
        ("a.mpg", b"\0\0\1\xb3" + bytes(20), ".mpg"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", ".eps"),
        ("random.bin", bytes(range(256)), ".bin"),
        ("._a.jpg", JPEG, "hidden"),
        (".a.jpg", JPEG, "hidden"),
    ],
)
def test_what_is_no_photo_is_named_by_its_suffix(
    tmp_path: Path, name: str, data: bytes, kind: str
) -> None:
    (tmp_path / name).write_bytes(data)
    found = list_photos(tmp_path)
    assert found.paths == []
    assert found.left_out == {kind: 1}


def test_one_line_counts_what_is_left_out(tmp_path: Path) -> None:
    written(tmp_path, a__jpg=JPEG, b__nef=b"", c__nef=b"", d__jxl=b"", e__txt=b"", f=b"")
    (tmp_path / ".git").mkdir()
    assert list_photos(tmp_path).notice() == (
        f"{tmp_path}: 1 photo; left out 2 .nef, 1 .jxl, 1 .txt, 1 hidden, 1 without suffix; "
        "convert .jxl, .nef to JPEG to use them"
    )
    for number in range(9):
        (tmp_path / f"x.k{number}").touch()
    line = list_photos(tmp_path).notice()
    assert line is not None
    assert ", 6 of other kinds; convert .jxl, .nef" in line


def test_extraction_and_prediction_take_the_same_photos_and_say_the_same(tmp_path: Path) -> None:
    written(tmp_path, b__jpg=JPEG, sub_SLASH_a=JPEG, note__txt=b"")
    (tmp_path / "sub/._c.jpg").write_bytes(b"")
    extracted, predicted = list[str](), list[str]()
    photos = read_photos(tmp_path, say=extracted.append)
    assert [photo.path for photo in photos] == ["b.jpg", "sub/a"]
    assert find_photos([str(tmp_path)], predicted) == [f"{tmp_path}/b.jpg", f"{tmp_path}/sub/a"]
    assert extracted == predicted == [f"{tmp_path}: 2 photos; left out 1 .txt, 1 hidden"]


def test_links_to_folders_are_followed_once_each(tmp_path: Path) -> None:
    here = written(tmp_path / "here", z_SLASH_a__jpg=JPEG)
    there = written(tmp_path / "there", b__jpg=JPEG, deep_SLASH_c__jpg=JPEG)
    (here / "a link").symlink_to(there)
    (here / "b link").symlink_to(there / "deep")  # listed by then
    (here / "c link").symlink_to(here / "z")  # listed under its own name
    (there / "back").symlink_to(there)
    (there / "up").symlink_to(tmp_path)
    (here / "broken").symlink_to(tmp_path / "absent")
    (here / "itself").symlink_to(here / "itself")
    (here / "absent.jpg").symlink_to(tmp_path / "absent")  # set aside later, with a reason
    (here / "d.jpg").symlink_to(there / "b.jpg")
    found = list_photos(here)
    assert found.paths == ["a link/b.jpg", "a link/deep/c.jpg", "absent.jpg", "d.jpg", "z/a.jpg"]
    assert found.left_out == {
        "linked folder that is listed already": 3,
        "link to a folder around this one": 1,
        "link that leads nowhere": 2,
    }


def failing(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Make reading the folder or file of this name fail: root, who runs tests, may read all."""
    real_scandir, real_open = os.scandir, open

    def scandir(path: Path) -> object:
        if Path(path).name == name:
            raise OSError(number, os.strerror(number))
        return real_scandir(path)

    def opened(path: object, *args: str) -> object:
        if str(path).endswith(name):
            raise OSError(number, os.strerror(number))
        return real_open(path, *args)  # type: ignore[call-overload]

    monkeypatch.setattr("os.scandir", scandir)
    monkeypatch.setattr("builtins.open", opened)


def test_a_folder_that_cannot_be_read_stops_the_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, a__jpg=JPEG, private_SLASH_b__jpg=JPEG)
    failing(monkeypatch, "private", errno.EACCES)
    with pytest.raises(FolderError, match=r"/private: cannot read this folder \(Permission denied"):
        list_photos(tmp_path)
    failing(monkeypatch, "private", errno.EIO)
    with pytest.raises(ShortageError, match=r"/private: cannot read \(Input/output error\), which"):
        list_photos(tmp_path)


def test_a_drives_lost_and_found_is_no_folder_of_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, a__jpg=JPEG).joinpath("lost+found").mkdir()
    failing(monkeypatch, "lost+found", errno.EACCES)
    assert list_photos(tmp_path).paths == ["a.jpg"]
    assert list_photos(tmp_path).left_out == {"lost+found": 1}


def test_a_shortage_makes_no_file_no_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, a__image=JPEG)
    failing(monkeypatch, "a.image", errno.EMFILE)
    with pytest.raises(ShortageError, match=r"a\.image: .*Too many open files.*ulimit -n"):
        list_photos(tmp_path)


def test_pipes_and_sockets_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert list_photos(tmp_path).left_out == {"without suffix": 1}
