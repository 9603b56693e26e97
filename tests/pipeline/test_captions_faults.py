"""What is wrong in a captions file is said, and never trained on without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.captions.dataset import listed_rows, read_captions, read_dataset
from pipeline.captions.mark import MARK
from pipeline.captions.records import Choice, DatasetError, Photo

GOOD = "".join(f"g{n}.jpg,A good caption.\n" for n in range(20))


def lines_of(file: Path) -> str:
    return "\n".join(read_dataset(file, Choice()).lines())


def captions_of(folder: Path, text: str) -> dict[str, tuple[str, ...]]:
    file = folder / "captions"
    file.write_text(text, encoding="utf-8")
    return {photo.path: photo.captions for photo in read_captions(file)}


def test_the_first_line_is_kept_where_there_is_no_header(tmp_path: Path) -> None:
    assert captions_of(tmp_path, '"a.jpg","A dog."\n"b.jpg","A cat."\n') == {
        "a.jpg": ("A dog.",),
        "b.jpg": ("A cat.",),
    }
    assert list(captions_of(tmp_path, "a.jpg| 0| A dog\nb.jpg| 0| A cat\n")) == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    "rest", ["c.jpg,A cow.\n", 'c.jpg,"A cow, brown."\n', 'c.jpg,A cow."\n', 'c.jpg,A "cow".\n']
)
def test_a_quote_that_is_not_closed_swallows_no_line(tmp_path: Path, rest: str) -> None:
    text = 'image,caption\na.jpg,"A dog.\nb.jpg,A cat.\n' + rest + GOOD
    found = captions_of(tmp_path, text)
    assert "a.jpg" not in found
    assert found["b.jpg"] == ("A cat.",)
    assert "c.jpg" in found
    assert len(found) == 22
    assert (
        "1 of 23 rows cannot be read (line 2: a quote is not closed: 'a.jpg,\"A dog.')"
        in lines_of(tmp_path / "captions")
    )


@pytest.mark.parametrize(
    ("cell", "caption"),
    [
        ('"A ""big"" dog, wet"', 'A "big" dog, wet'),
        (r'"A \"big\" dog, wet"', 'A "big" dog, wet'),
        (' "A dog, wet" ', "A dog, wet"),
        ('"Stop" says a sign', '"Stop" says a sign'),
        ('A 5" nail', 'A 5" nail'),
        ('"A dog\n\nruns, wet"', "A dog runs, wet"),
        ('""', ""),
    ],
)
def test_quotes_are_read_as_they_are_meant(tmp_path: Path, cell: str, caption: str) -> None:
    found = captions_of(tmp_path, f"image,caption\na.jpg,{cell}\n{GOOD}")
    assert found["a.jpg"] == ((caption,) if caption else ())
    assert len(found) == 21


def test_a_tab_within_quotes_is_part_of_the_caption(tmp_path: Path) -> None:
    assert captions_of(tmp_path, 'image\tcaption\na.jpg\t"A dog\truns"\nb.jpg\tA cat\n') == {
        "a.jpg": ("A dog runs",),
        "b.jpg": ("A cat",),
    }


def test_flickrs_captions_keep_quotes_at_their_start(tmp_path: Path) -> None:
    found = captions_of(tmp_path, 'a.jpg#0\t"Stop" is on a sign\na.jpg#1\t"A sign"\n')
    assert found == {"a.jpg": ('"Stop" is on a sign', '"A sign"')}


def test_a_few_rows_that_cannot_be_read_are_shown_and_many_stop_the_run(tmp_path: Path) -> None:
    bars = "".join(f"g{n}.jpg| 0| A good caption .\n" for n in range(20))
    head, bad = "image_name| comment_number| comment\n", "b.jpg| 4   A dog runs .\n"
    found = captions_of(tmp_path, head + bars + bad)
    assert "b.jpg" not in found
    said = lines_of(tmp_path / "captions")
    assert "1 of 21 rows cannot be read (line 22: 2 cells instead of 3: 'b.jpg| 4   A dog" in said
    with pytest.raises(DatasetError, match=r"4 of 24 rows .*line 22.*line 24.*more than a tenth"):
        captions_of(tmp_path, head + bars + 4 * bad)


def test_empty_cells_and_words_for_nothing_are_left_out_and_counted(tmp_path: Path) -> None:
    text = "image,caption\na.jpg,A dog runs.\na.jpg,\na.jpg,nan\nb.jpg,NULL\nb.jpg,Nantes harbour\n"
    assert captions_of(tmp_path, text) == {
        "a.jpg": ("A dog runs.",),
        "b.jpg": ("Nantes harbour",),
    }
    said = lines_of(tmp_path / "captions")
    assert "captions left out: 1 empty, 1 “nan”, 1 “NULL”" in said


def test_hash_signs_in_names_of_files_stay(tmp_path: Path) -> None:
    text = "image,caption\nx.jpg#1.jpg,A dog runs.\nimg#1.jpg,A cat sits.\ny.jpg.1#0,A cow.\n"
    assert list(captions_of(tmp_path, text)) == ["x.jpg#1.jpg", "img#1.jpg", "y.jpg.1"]


def test_large_cells_beside_captions_are_no_obstacle(tmp_path: Path) -> None:
    large = "x" * 10_000_000
    assert captions_of(tmp_path, f"image,caption,bytes\na.jpg,A dog runs.,{large}\n") == {
        "a.jpg": ("A dog runs.",)
    }
    found = captions_of(tmp_path, f"image,caption\na.jpg,{large}\nb.jpg,A cat sits.\n")
    assert found == {"a.jpg": (), "b.jpg": ("A cat sits.",)}
    assert "1 longer than 20,000 characters" in lines_of(tmp_path / "captions")


def test_lines_in_another_encoding_are_left_out_of_a_file_in_utf_8(tmp_path: Path) -> None:
    good = "".join(f"g{n}.jpg,Ein schöner Satz.\n" for n in range(20)).encode()
    (tmp_path / "c").write_bytes(
        b"image,caption\n" + good + "b.jpg,Ein Hündchen\n".encode("cp1252")
    )
    assert len(read_captions(tmp_path / "c")) == 20
    assert "line 22: letters in another encoding: 'b.jpg" in lines_of(tmp_path / "c")


def coco(*notes: dict[str, object]) -> str:
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}]
    return json.dumps({"images": images, "annotations": list(notes)})


def test_null_and_rejected_captions_of_coco_are_left_out(tmp_path: Path) -> None:
    text = coco(
        {"image_id": 1, "caption": None},
        {"image_id": 1, "caption": "A dog.", "is_rejected": False},
        {"image_id": 1, "caption": "Unclear.", "is_rejected": True, "is_precanned": False},
        {"image_id": 2, "caption": "Too dark.", "is_precanned": True},
        {"image_id": "2", "caption": "A cat."},
        {"image_id": 3, "caption": "Of no photo."},
    )
    assert captions_of(tmp_path, text) == {"a.jpg": ("A dog.",), "b.jpg": ("A cat.",)}
    assert lines_of(tmp_path / "captions").endswith(
        "captions left out: 1 rejected, 1 written in advance, 1 empty, "
        "1 of photos that the file does not name"
    )


def test_rejected_captions_are_left_out_of_every_layout(tmp_path: Path) -> None:
    table = "image,caption,is_rejected\na.jpg,A dog.,False\na.jpg,A blur.,True\n"
    assert captions_of(tmp_path, table) == {"a.jpg": ("A dog.",)}
    records = [
        {"image": "a.jpg", "caption": "A dog."},
        {"image": "a.jpg", "caption": "A blur.", "is_rejected": True},
    ]
    assert captions_of(tmp_path, json.dumps(records)) == {"a.jpg": ("A dog.",)}


def test_an_id_that_stands_for_two_photos_is_the_id_of_neither(tmp_path: Path) -> None:
    images = [
        {"filename": f"{name}.jpg", "cocoid": 1, "split": "train", "sentences": [{"raw": name}]}
        for name in ("one", "two")
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    assert [photo.image_id for photo in read_captions(tmp_path / "k.json")] == [
        "one.jpg",
        "two.jpg",
    ]
    assert "some image ids stand for several photos" in lines_of(tmp_path / "k.json")


def test_a_byte_order_mark_is_no_part_of_a_list_or_of_json(tmp_path: Path) -> None:
    (tmp_path / "only").write_text("a.jpg\n", encoding="utf-8-sig")
    photos = Photo("7", "a.jpg"), Photo("8", "b.jpg")
    assert listed_rows(photos, tmp_path / "only").tolist() == [0]
    (tmp_path / "c").write_text(coco({"image_id": 1, "caption": "A dog."}), encoding="utf-8-sig")
    assert read_captions(tmp_path / "c")[0] == Photo("1", "a.jpg", ("A dog.",))


@pytest.mark.parametrize(
    "text",
    [
        f"image,caption,{MARK}\na.jpg,A dog runs.,best.cap\n",
        json.dumps([{"image_id": "a.jpg", "caption": "A dog runs.", MARK: "best.cap"}]),
        coco({"image_id": 1, "caption": "A dog runs.", MARK: "best.cap"}),
    ],
)
def test_captions_that_this_program_wrote_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DatasetError, match=f"captions: written by this program .*{MARK}"):
        captions_of(tmp_path, text)
