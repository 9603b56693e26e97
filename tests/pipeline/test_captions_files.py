from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.captions.dataset import read_captions, read_photos
from pipeline.captions.records import DatasetError, Photo
from pipeline.photos.sources.errors import SourceError

COCO = {
    "images": [
        {"id": 42, "file_name": "b.jpg", "height": 1, "width": 1},
        {"id": 7, "file_name": "a.jpg", "height": 1, "width": 1},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": "A\n dog. "},
        {"id": 2, "image_id": 42, "caption": "A cat."},
        {"id": 3, "image_id": 7, "caption": " "},
    ],
}
KARPATHY = {
    "images": [
        {
            "filename": "a.jpg",
            "filepath": "val2014",
            "cocoid": 7,
            "split": "train",
            "sentences": [{"raw": "A dog.", "tokens": ["a", "dog"]}],
        },
        {"filename": "b.jpg", "split": "restval", "sentences": [{"raw": "A cat.", "tokens": []}]},
        {"filename": "c.jpg", "split": "test", "sentences": [{"raw": "A bird.", "tokens": []}]},
    ]
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.jpg", "a.jpg", "sub/c.PNG", "note.txt", ".hidden.jpg"):
        (folder / name).touch()
    return folder


def written(tmp_path: Path, text: object) -> Path:
    path = tmp_path / "captions"
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path


def test_a_folder_alone_gives_its_photos_sorted(images: Path) -> None:
    assert [p.path for p in read_photos(images)] == ["a.jpg", "b.jpg", "sub/c.PNG"]
    assert read_photos(images, limit=1) == [Photo("a.jpg", "a.jpg")]


def test_coco_captions_follow_their_image_ids(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_photos(images, written(tmp_path, COCO)) == [
        Photo("42", "b.jpg", ("A cat.",)),
        Photo("7", "a.jpg", ("A dog.",)),
    ]
    assert capsys.readouterr().out == ""


def test_karpathy_splits_are_chosen(images: Path, tmp_path: Path) -> None:
    captions = written(tmp_path, KARPATHY)
    train = read_photos(images, captions, split="train,restval")
    assert train == [Photo("7", "a.jpg", ("A dog.",)), Photo("b.jpg", "b.jpg", ("A cat.",))]
    (images / "val2014").mkdir()
    (images / "val2014" / "a.jpg").touch()
    assert read_photos(images, captions, split="train")[0].path == "val2014/a.jpg"
    with pytest.raises(DatasetError, match="no split dev; it has restval, test, train"):
        read_photos(images, captions, split="dev")


@pytest.mark.parametrize(
    "text",
    [
        'image,caption\na.jpg,A dog .\na.jpg,"One, two"\nb.jpg,A cat .\n',
        "a.jpg#0\tA dog .\na.jpg#1\tOne, two\nb.jpg#0\tA cat .\n",
        "image_name| comment_number| comment\na.jpg| 0| A dog .\na.jpg| 1| One, two\n"
        "b.jpg| 0| A cat .\n",
        "a.jpg,A dog .\na.jpg,One, two\nb.jpg,A cat .\n",
        '\ufeffimage,caption\r\na.jpg,A dog .\r\na.jpg,"One, two"\r\nb.jpg,A cat .\r\n',
    ],
)
def test_flickr_formats_agree(images: Path, tmp_path: Path, text: str) -> None:
    assert read_photos(images, written(tmp_path, text)) == [
        Photo("a.jpg", "a.jpg", ("A dog .", "One, two")),
        Photo("b.jpg", "b.jpg", ("A cat .",)),
    ]


def test_only_keeps_listed_photos_and_names_unknown_ones(images: Path, tmp_path: Path) -> None:
    captions = written(tmp_path, COCO)
    (tmp_path / "list.txt").write_text("a.jpg\n\n")
    assert [p.image_id for p in read_photos(images, captions, only=tmp_path / "list.txt")] == ["7"]
    (tmp_path / "list.txt").write_text("a.jpg\nzz.jpg\n")
    with pytest.raises(DatasetError, match=r"1 of 2 names are not among the photos .*zz\.jpg"):
        read_photos(images, captions, only=tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "neither JSON nor a table"),
        ("{", "not valid JSON"),
        ("[1, 2]", "no records in it"),
        ('{"xyz": 1}', "no column names photos; the first records are"),
        ('{"images": [], "annotations": []}', "names no photo"),
        ('{"images": [{"id": 1, "file_name": "a.jpg"}]}', "no annotations"),
        (
            '{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"bbox": 1}]}',
            "its annotations have no caption",
        ),
        (
            '{"images": [{"id": 1}], "annotations": []}',
            "1 of 1 rows cannot be read \\(image 1: no file_name and id: '{\"id\": 1}'\\)",
        ),
        ('{"images": [3], "annotations": []}', "image 1: no file_name and id: '3'"),
        (
            "image,caption\nb.jpg,A cat\nno photo here\n",
            "1 of 2 rows cannot be read .line 3: 1 cells instead of 2: 'no photo here'",
        ),
        (
            "image,caption\nzz.jpg,A dog\n",
            r"none of the photos of .* is here \(looked for zz.jpg; there are 5 files, as ",
        ),
        ("image,caption\na1.jpg,A dog\n", r"; a.jpg looks alike\)"),
    ],
)
def test_a_wrong_captions_file_is_one_line(
    images: Path, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        read_photos(images, written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_binary_captions_file_and_missing_paths_are_one_line(
    images: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.bin").write_bytes(b"\xff\xd8\xff\xe0" * 10)
    with pytest.raises(DatasetError, match="neither"):
        read_photos(images, tmp_path / "x.bin")
    (tmp_path / "x.bin").write_bytes(b"\x7fELF\0\0\x01\x02\0" * 10)
    with pytest.raises(DatasetError, match="captions file"):
        read_photos(images, tmp_path / "x.bin")
    with pytest.raises(DatasetError, match="cannot read"):
        read_photos(images, tmp_path / "absent.json")
    with pytest.raises(SourceError, match="no such folder"):
        read_photos(tmp_path / "absent")
    with pytest.raises(DatasetError, match="has no splits"):
        read_photos(images, written(tmp_path, COCO), split="train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no photos found"):
        read_photos(tmp_path / "empty")


def test_sample_captions_are_read_whole(sample_data: Path) -> None:
    flickr = read_photos(sample_data / "flickr8k/images", sample_data / "flickr8k/captions.txt")
    assert len(flickr) == 7000
    assert {len(photo.captions) for photo in flickr} == {5}
    coco = read_photos(sample_data / "coco/val2017", sample_data / "coco/captions_val2017.json")
    assert len(coco) == 199  # the photos that are here
    coco = read_captions(sample_data / "coco/captions_val2017.json")
    assert len(coco) == 5000
    assert sum(len(photo.captions) for photo in coco) == 25014


def test_a_caption_goes_on_over_lines_as_its_csv_says(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text(
        'image,caption\na.jpg,"A dog\nruns."\na.jpg,A cat\u2028sits.\n'
        "b.jpg,A bird\x0b\x85 flies.\n",
        encoding="utf-8",
    )
    photos = read_captions(tmp_path / "captions.csv")
    assert photos == [
        Photo("a.jpg", "a.jpg", ("A dog runs.", "A cat sits.")),
        Photo("b.jpg", "b.jpg", ("A bird flies.",)),
    ]


@pytest.mark.parametrize("half", ["\\ud83d", "\\udcff"])
def test_half_of_a_character_is_found_while_the_file_is_read(tmp_path: Path, half: str) -> None:
    record = (
        '{"images": [{"id": 1, "file_name": "a.jpg"}],'
        ' "annotations": [{"id": 1, "image_id": 1, "caption": "a dog %s runs"}]}'
    )
    (tmp_path / "x.json").write_text(record % half)
    message = re.escape(f"x.json: half of a character ('{half}') in 'a dog {half} runs' of photo")
    with pytest.raises(DatasetError, match=message) as caught:
        read_captions(tmp_path / "x.json")
    str(caught.value).encode()
    (tmp_path / "x.json").write_text(record % "\\ud83d\\ude00")  # a whole one
    assert read_captions(tmp_path / "x.json")[0].captions == ("a dog 😀 runs",)
