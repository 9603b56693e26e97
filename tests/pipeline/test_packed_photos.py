"""Photos and captions, packed, are those of plain lists."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from cache import record
from cache.record import Strings
from pipeline.captions.dataset import read_captions
from pipeline.captions.image_ids import NumberId
from pipeline.captions.photos import Photos
from pipeline.captions.records import Photo, Reading

LISTED = [
    Photo("7", "b/7.jpg", ("A dog.", "Ein Hund läuft.")),
    Photo(NumberId("42"), "a/x.jpg"),
    Photo("ü", "ü.jpg", ("犬",)),
    Photo("z", "z.jpg", ("", "A cat.")),
]


def test_packed_photos_are_a_sequence_of_the_same_photos() -> None:
    photos = Photos.pack(LISTED)
    assert photos == LISTED
    assert photos != LISTED[::-1]
    assert [photos[row] for row in range(-4, 4)] == LISTED * 2
    assert [type(photo.image_id) for photo in photos] == [str, NumberId, str, str]
    assert type(photos[-3].image_id) is NumberId
    for part in (slice(1, 3), slice(2), slice(3, 1), slice(None, None, 2), slice(9, 12)):
        assert photos[part] == LISTED[part]
        assert photos[part].caption_rows.tolist() == [
            row for row, photo in enumerate(LISTED[part]) for _ in photo.captions
        ]
    assert photos.take(np.array([3, 0, 0])) == [LISTED[3], LISTED[0], LISTED[0]]
    assert photos.take(np.array([], int)) == []
    assert photos[1:][1:] == pickle.loads(pickle.dumps(photos[2:]))
    with pytest.raises(IndexError):
        photos[4]


def test_strings_are_taken_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_ITERATED", 3)
    draw = random.Random(0)
    texts = ["犬" * draw.randrange(3) + "x" * draw.randrange(4) for _ in range(20)]
    strings = Strings.pack(texts)
    assert list(strings) == texts
    index = [draw.randrange(20) for _ in range(50)]
    assert list(strings.take(np.array(index))) == [texts[each] for each in index]
    assert list(strings.part(4, 11).take(np.array([6, 0]))) == [texts[10], texts[4]]
    assert list(strings.take(np.array([], int))) == []


def test_captions_are_grouped_by_photo_in_the_order_in_which_they_came() -> None:
    reading = Reading("x.csv", "table")
    for name, text in (("b", "first of b"), ("a", "first of a"), ("b", "second of b")):
        reading.add(name, [text])
    reading.add("c", ["first of c", None, "  second  of c "])
    reading.add("d", [])
    for photo_of, expected in (
        ([0, 1, 2, 3], "first of b,second of b,first of a,first of c,second of c"),
        ([2, 1, 0, 3], "first of c,second of c,first of a,first of b,second of b"),
        ([1, 0, 0, -1], "first of a,first of c,second of c,first of b,second of b"),
        ([-1, 0, -1, -1], "first of a"),
    ):
        texts, photos = reading.captions(np.array(photo_of, np.int32))
        assert list(texts) == expected.split(",")
        owners = [reading.names[text[-1]] for text in texts]
        assert photos.tolist() == [photo_of[owner] for owner in owners]
    assert reading.left_out == {"empty": 1}


def test_two_files_count_a_caption_once_and_one_file_as_often_as_it_has_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,caption\n1.jpg,A dog.\n1.jpg,A dog.\n2.jpg,A cat.\n")
    (tmp_path / "b.csv").write_text("image,caption\n3.jpg,A cow.\n1.jpg,A dog.\n1.jpg,A hen.\n")
    (tmp_path / "c.csv").write_text("image,caption\n2.jpg,A cow.\n1.jpg,A hen.\n1.jpg,A pig.\n")
    photos = read_captions([tmp_path / name for name in ("a.csv", "b.csv", "c.csv")])
    assert {photo.path: photo.captions for photo in photos} == {
        "1.jpg": ("A dog.", "A dog.", "A hen.", "A pig."),
        "2.jpg": ("A cat.", "A cow."),
        "3.jpg": ("A cow.",),
    }
