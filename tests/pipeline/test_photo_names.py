"""Names in captions files lead to the files that are meant, or to none."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.captions.photo_index import BY_END, BY_NAME, BY_PATH, PhotoIndex


def folder(tmp_path: Path, *names: str) -> PhotoIndex:
    for name in names:
        path = tmp_path / "img" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return PhotoIndex(tmp_path / "img")


@pytest.mark.parametrize(
    ("name", "path", "how"),
    [
        ("p1.jpg", "p1.jpg", BY_PATH),
        (" ./p1.jpg ", "p1.jpg", BY_PATH),
        ("p1.jpg#3", "p1.jpg", BY_PATH),
        ("sub/p2.jpg", "sub/p2.jpg", BY_PATH),
        ("sub\\P2.JPG", "sub/p2.jpg", BY_PATH),
        ("p1", "p1.jpg", BY_PATH),
        ("PHOTO.jpg", "Photo.JPG", BY_PATH),
        ("caf\u00e9.jpg", "cafe\u0301.jpg", BY_PATH),
        ("my%20dog.jpg", "my dog.jpg", BY_PATH),
        ("x#1.jpg", "x#1.jpg", BY_PATH),
        ("100%.jpg", "100%.jpg", BY_PATH),
        ("img/p1.jpg", "p1.jpg", BY_END),
        ("/home/me/photos/p1.jpg", "p1.jpg", BY_END),
        ("C:\\photos\\p1.jpg", "p1.jpg", BY_END),
        ("https://x.org/a/my%20dog.jpg?width=9#top", "my dog.jpg", BY_END),
        ("train/sub/p2.jpg", "sub/p2.jpg", BY_END),
        ("../p1.jpg", "p1.jpg", BY_END),
        ("p2.jpg", "sub/p2.jpg", BY_NAME),
        ("other/p2", "sub/p2.jpg", BY_NAME),
        ("noted", "noted.jpg", BY_PATH),
    ],
)
def test_a_name_leads_to_its_file(tmp_path: Path, name: str, path: str, how: str) -> None:
    index = folder(
        tmp_path,
        *("p1.jpg", "sub/p2.jpg", "Photo.JPG", "cafe\u0301.jpg", "my dog.jpg", "x#1.jpg"),
        *("100%.jpg", "noted.jpg", "noted.txt"),
    )
    match = index.find(name)
    assert match is not None
    assert (match.path, match.how) == (path, how)


@pytest.mark.parametrize(
    "name", ["p9.jpg", "", "/", "..", "p1.jpg/", "p1.jpg/x", "a\0b", "http://["]
)
def test_other_names_lead_nowhere(tmp_path: Path, name: str) -> None:
    index = folder(tmp_path, "p1.jpg")
    match = index.find(name)
    assert match is None or name == "p1.jpg/"


def test_whole_paths_inside_the_folder_are_found(tmp_path: Path) -> None:
    index = folder(tmp_path, "p1.jpg", "sub/p1.jpg")
    for name, path in (("p1.jpg", "p1.jpg"), ("sub/p1.jpg", "sub/p1.jpg")):
        found = index.find(str(tmp_path / "img" / name))
        assert found is not None
        assert (found.path, found.how) == (path, BY_PATH)


def test_a_bare_name_that_several_folders_have_is_ambiguous(tmp_path: Path) -> None:
    matches = folder(tmp_path, "dogs/1.jpg", "cats/1.jpg", "cats/2.jpg").match(
        ["1.jpg", "2.jpg", "cats/1.jpg"]
    )
    assert matches.paths == [None, "cats/2.jpg", "cats/1.jpg"]
    assert matches.ambiguous == ["1.jpg"]


def test_two_names_do_not_share_a_photo(tmp_path: Path) -> None:
    matches = folder(tmp_path, "1.jpg", "2.jpg").match(
        ["train/1.jpg", "val/1.jpg", "img/2.jpg", "val/2.jpg"]
    )
    assert matches.paths == [None, None, "2.jpg", None]  # the folder is called img
    assert sorted(matches.ambiguous) == ["train/1.jpg", "val/1.jpg", "val/2.jpg"]


def test_names_that_differ_in_case_only_keep_apart(tmp_path: Path) -> None:
    index = folder(tmp_path, "a.jpg", "A.jpg")
    for name in ("a.jpg", "A.jpg"):
        match = index.find(name)
        assert match is not None
        assert match.path == name
    assert index.match(["a.JPG"]).ambiguous == ["a.JPG"]
    assert index.match(["x/A.jpg"]).paths == ["A.jpg"]


def test_spellings_of_one_name_share_their_photo(tmp_path: Path) -> None:
    names = ["p1.jpg", "P1.JPG", "p1", "./p1.jpg"]
    assert folder(tmp_path, "p1.jpg").match(names).paths == ["p1.jpg"] * len(names)


def test_folders_that_are_links_are_followed_once(tmp_path: Path) -> None:
    folder(tmp_path, "real/p1.jpg")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "p2.jpg").touch()
    (tmp_path / "img" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "img" / "real" / "circle").symlink_to(tmp_path / "img")
    index = PhotoIndex(tmp_path / "img")
    assert sorted(index.some_files()) == ["linked/p2.jpg", "real/p1.jpg"]
