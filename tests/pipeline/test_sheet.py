"""Sheets: every photo with its texts below it, in any script, in the place of no other file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.gallery.sheet import fonts as module
from pipeline.gallery.sheet import sheet
from pipeline.gallery.sheet.fonts import Fonts, has_raqm
from pipeline.gallery.sheet.lines import clusters, set_lines
from pipeline.gallery.sheet.sheet import SheetError, Tile, check_sheet, write_sheet
from pipeline.photos.decoding import decode
from tests.conftest import write_photo

WIDTH = 320


def pixels(path: Path) -> NDArray[np.uint8]:
    return decode(path.read_bytes())


def ink(path: Path) -> NDArray[np.bool_]:
    """(H, W) where something dark is."""
    darkest: NDArray[np.bool_] = pixels(path).max(2) < 100
    return darkest


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "font_folders", list)


@pytest.mark.parametrize("count", [1, 5])
def test_a_sheet_holds_every_photo(tmp_path: Path, count: int) -> None:
    for seed in range(count):
        write_photo(tmp_path / f"{seed}.jpg", seed, (640, 300))
    tiles = [Tile(tmp_path / f"{s}.jpg", ("a caption " * 12,), ("truth",)) for s in range(count)]
    path = tmp_path / "new" / "sheet.png"
    lines = write_sheet(tiles, path, legend="said", notes_legend="true", columns=3)
    assert lines == [f"{path}: a sheet of {count} photo{'s' * (count > 1)}"]
    made = pixels(path)
    assert made.shape[1] == min(count, 3) * (WIDTH + 12) + 12
    for number in range(count):
        with Image.open(tmp_path / f"{number}.jpg") as photo:
            expected = np.array(photo.resize((320, 150))).mean((0, 1))
        row, column = divmod(number, 3)
        x = 12 + column * (WIDTH + 12)
        strip = made[:, x : x + WIDTH]
        filled = (strip != 255).any(2).mean(1) > 0.9  # rows of a photo
        top = np.flatnonzero(filled)[row * 150]
        assert abs(strip[top : top + 150].mean((0, 1)) - expected).max() < 4, number


def test_captions_are_dark_and_notes_are_grey_below_the_photo(tmp_path: Path) -> None:
    write_photo(tmp_path / "a.jpg", 0)
    for name, tile in (
        ("both", Tile(tmp_path / "a.jpg", ("A dog runs.",), ("true",))),
        ("one", Tile(tmp_path / "a.jpg", ("A dog runs.",))),
        ("none", Tile(tmp_path / "a.jpg", ())),
    ):
        write_sheet([tile], tmp_path / f"{name}.png", legend="")
    heights = [pixels(tmp_path / f"{name}.png").shape[0] for name in ("none", "one", "both")]
    assert 15 < heights[1] - heights[0] < 25
    assert 12 < heights[2] - heights[1] < 22
    both = pixels(tmp_path / "both.png")
    assert ink(tmp_path / "both.png")[heights[0] - 12 : heights[1] - 12].sum() > 100
    notes = both[heights[1] - 12 :]
    assert notes.min() >= 108  # grey alone
    assert (notes < 130).any()


def test_lines_are_never_wider_than_a_photo(no_fonts: None) -> None:
    fonts = Fonts(16)
    texts = ["word " * 40, "Donaudampfschifffahrt" * 9, "一只狗在沙滩上奔跑" * 9, "ü\u0308" * 200]
    for text in texts:
        lines = set_lines(text, fonts, WIDTH)
        assert len(lines) > 2
        assert all(0 < line.width <= WIDTH for line in lines)
        said = "".join(run.text for line in lines for run in line.runs)
        assert said.replace(" ", "") == text.replace(" ", "")
    assert set_lines(" \n\t ", fonts, WIDTH) == []


def test_marks_and_closing_signs_stay_with_their_letters() -> None:
    assert list(clusters("कि")) == ["कि"]
    assert list(clusters("क्या")) == ["क्या"]
    assert list(clusters("เด็ก")) == ["เด็", "ก"]
    assert list(clusters("狗。（猫）")) == ["狗。", "（猫）"]


def test_text_that_steers_is_shown_without_steering(no_fonts: None) -> None:
    (line,) = set_lines("a\x1b[31m\u202eb\u2066c\ud800d", Fonts(16), WIDTH)
    assert "".join(run.text for run in line.runs) == "a [31mbc d"


def test_scripts_without_a_font_are_named(no_fonts: None, tmp_path: Path) -> None:
    write_photo(tmp_path / "a.jpg", 0)
    tile = Tile(tmp_path / "a.jpg", ("Hund, собака, سگ",), ("สุนัข और",))
    lines = write_sheet([tile], tmp_path / "x.png", legend="")
    assert lines[1:] == [
        f"{tmp_path}/x.png: no installed font has the letters of Devanagari (औ); install one, such "
        "as a Noto Sans of that script",
        f"{tmp_path}/x.png: no installed font has the letters of Thai (ส); install one, such as a "
        "Noto Sans of that script",
    ]


def test_an_installed_font_is_taken_for_letters_that_the_first_one_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    letter = "\U0001d49c"  # a script A, in STIX alone
    monkeypatch.setattr(module, "font_folders", lambda: [folder, tmp_path / "missing"])
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    assert ord(letter) not in module.letters_of(folder / "DejaVuSans.ttf")
    fonts = Fonts(16)
    runs = fonts.runs(f"a {letter}\u4e00")
    assert "".join(run.text for run in runs) == f"a {letter}\u4e00"
    assert list(fonts.missing) == ["Hani"]
    assert module.letters_of(tmp_path / "damaged.ttf") == frozenset()
    assert Fonts(16, [tmp_path / "damaged.ttf"]).runs("一")[0].text == "一"


@pytest.mark.skipif(not has_raqm(), reason="this Pillow has no Raqm")
def test_text_from_right_to_left_ends_at_the_right(no_fonts: None, tmp_path: Path) -> None:
    write_photo(tmp_path / "a.jpg", 0)
    sides = {}
    for name, text in (("ltr", "dog"), ("rtl", "سگ")):
        write_sheet([Tile(tmp_path / "a.jpg", (text,))], tmp_path / f"{name}.png", legend="")
        columns = np.flatnonzero(ink(tmp_path / f"{name}.png")[-38:].any(0))
        sides[name] = (columns.min(), columns.max())
    assert sides["ltr"][0] < 20
    assert sides["ltr"][1] < 80
    assert sides["rtl"][0] > WIDTH - 60
    assert sides["rtl"][1] > WIDTH - 5


def test_scripts_that_need_raqm_are_named_where_it_is_missing(
    no_fonts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.gallery.sheet.fonts.has_raqm", lambda: False)
    monkeypatch.setattr("pipeline.gallery.sheet.lines.has_raqm", lambda: False)
    fonts = Fonts(16)
    (line,) = set_lines("سگ", fonts, WIDTH)
    assert line.width > 0
    (notice,) = fonts.notices()
    assert notice.startswith("Arabic: letters are not joined or ordered as they should be")


def test_photos_that_cannot_be_shown_are_counted(tmp_path: Path) -> None:
    write_photo(tmp_path / "a.jpg", 0)
    (tmp_path / "b.jpg").write_bytes(b"no photo")
    tiles = [
        Tile(tmp_path / "a.jpg", ("A.",), digest=np.zeros(16, np.uint8)),
        Tile(tmp_path / "b.jpg", ("B.",)),
        Tile(tmp_path / "c.jpg", ("C.",)),
        Tile(None, (), ("d.jpg: broken",)),
    ]
    lines = write_sheet(tiles, tmp_path / "x.png", legend="")
    assert lines[1] == (
        f"{tmp_path}/x.png: 3 of them cannot be shown (first: a.jpg: the file is not the one that "
        "was captioned)"
    )


def test_many_photos_are_on_pages_and_a_shorter_sheet_removes_those_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheet, "PHOTOS_ON_A_PAGE", 2)
    write_photo(tmp_path / "a.jpg", 0)
    tiles = [Tile(tmp_path / "a.jpg", ("A.",))] * 5
    path = tmp_path / "x.png"
    (line,) = write_sheet(tiles, path, legend="")
    assert line == f"{path}: a sheet of 5 photos on 3 pages, to x-3.png"
    write_sheet(tiles[:1], tmp_path / "x-7.png", legend="")  # a sheet of its own
    write_sheet(tiles[:3], path, legend="")
    names = sorted(file.name for file in tmp_path.glob("*.png"))
    assert names == ["x-2.png", "x-7.png", "x.png"]
    with pytest.raises(SheetError, match=r"x-7\.png: is no sheet that cap has written"):
        check_sheet(path, 14)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("x.jpg", 1, "sheets are PNG"),
        ("x.png", 1201, "a sheet has at most 1,200 photos, not 1,201; --gallery shows any number"),
        ("mine.png", 1, "is no sheet that cap has written"),
        ("x.png", 61, r"x-2\.png: is no sheet that cap has written"),
        ("a.txt/x.png", 1, "may not write there"),
    ],
)
def test_a_sheet_that_cannot_be_is_one_line(
    name: str, count: int, message: str, tmp_path: Path
) -> None:
    for other in ("mine.png", "x-2.png", "a.txt"):
        (tmp_path / other).write_bytes(b"a picture of mine")
    with pytest.raises(SheetError, match=message):
        check_sheet(tmp_path / name, count)
    assert (tmp_path / "mine.png").read_bytes() == b"a picture of mine"
