"""The files of a gallery: what the commands put into it, and what it never touches."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache.atomic import WriteError
from cache.store import DONE, FeatureCache
from pipeline.gallery import gallery as module
from pipeline.gallery.folder import GalleryError
from pipeline.gallery.gallery import Gallery, Piece, ShownCaption, ShownPhoto
from pipeline.gallery.page import embedded_json
from pipeline.gallery.thumbnails import LONG_SIDE, Thumbnails
from pipeline.photos.drive.silence import StalledError
from tests.conftest import write_photo
from tests.pipeline.test_captioner import trained
from tests.pipeline.test_cli import cap
from train.captions.sentence import sentence
from train.model.bundle import load_bundle

SHOWN = ShownPhoto("a.jpg", (ShownCaption((Piece("A", 0.5), Piece(" dog", 0.25)), 0.4),))


def data_of(page: Path) -> dict[str, Any]:
    text = page.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    data = json.loads(found)
    assert isinstance(data, dict)
    return data


def text_of(caption: dict[str, Any]) -> str:
    return "".join(piece[0] for piece in caption["pieces"])


def entries(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write(folder: Path, *photos: Path) -> str:
    with Gallery(folder) as gallery:
        for photo in photos:
            gallery.add(SHOWN, photo)
        return gallery.finish("A title")


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureCache, Path]:
    return trained(photos, tmp_path_factory.mktemp("gallery"))


def test_predict_shows_what_it_prints(
    made: tuple[FeatureCache, Path], photos: Path, tmp_path: Path
) -> None:
    names = [photos / f"{letter}.jpg" for letter in "abe"]
    common = ["predict", *names, "--model", made[1], "--json", "--log-probs"]
    alone, _ = cap(*common, code=1)
    out, err = cap(*common, "--gallery", tmp_path / "out", code=1)
    assert out == alone
    page = tmp_path / "out" / "index.html"
    assert f"{page}: a gallery of 3 photos in one file (" in err
    assert entries(page.parent) == [".cap-gallery", "index.html"]
    printed = [json.loads(line) for line in out.splitlines()]
    shown = data_of(page)["photos"]
    assert [photo["name"] for photo in shown] == ["a.jpg", "b.jpg", "e.jpg"]  # without the folder
    assert str(photos) not in page.read_text(encoding="utf-8")
    for photo, line in zip(shown[:2], printed, strict=False):
        best, *others = photo["captions"]
        assert text_of(best) == line["caption"]
        probabilities = [piece[1] for piece in best["pieces"] if len(piece) > 1]
        expected = [math.exp(value) for value in line["log_probs"][:-1]]
        assert probabilities == pytest.approx(expected, abs=2e-4)
        mean = math.exp(sum(line["log_probs"]) / len(line["log_probs"]))
        assert best["confidence"] == pytest.approx(mean, abs=2e-4)
        assert len(others) == 2  # of three beams
        assert len({text_of(caption) for caption in photo["captions"]}) == 3
        assert photo["uri"].startswith("data:image/jpeg;base64,")
    assert shown[2] == {
        "name": "e.jpg",
        "captions": [],
        "error": "not an image, or of an unknown format",
    }


def test_evaluate_shows_references_and_each_photos_own_cider(
    made: tuple[FeatureCache, Path], photos: Path, tmp_path: Path
) -> None:
    cache, run = made
    images = tmp_path / "images"
    shutil.copytree(photos, images)
    write_photo(images / "b.jpg", 99)
    (images / "c.jpg").unlink()
    out, _ = cap(
        *("evaluate", "--model", run, "--cache", cache.path, "--no-meteor", "--json"),
        *("--out", tmp_path / "scores", "--images", images, "--gallery", tmp_path / "page"),
    )
    data = data_of(tmp_path / "page" / "index.html")
    shown = {photo["name"]: photo for photo in data["photos"]}
    assert list(shown) == [f"{letter}.jpg" for letter in "abcdefghijkl"]
    scores = json.loads(out)
    assert f"CIDEr {100 * scores['cider']:.1f}" in data["facts"]
    scored = [photo["cider"] for photo in shown.values() if "cider" in photo]
    assert len(scored) == 11
    assert np.mean(scored) == pytest.approx(100 * scores["cider"], abs=0.06)
    assert shown["a.jpg"]["references"] == [
        "A photo, number a, of coarse noise .",
        "Noise a .",
    ]
    assert shown["e.jpg"]["error"] == "not an image, or of an unknown format"
    assert shown["b.jpg"]["missing"] == "the file is not the one that was captioned"
    assert shown["c.jpg"]["missing"] == "file not found"
    assert [name for name, photo in shown.items() if "uri" not in photo] == [
        *("b.jpg", "c.jpg", "e.jpg"),
    ]

    (results,) = (tmp_path / "scores").glob("*.predictions.json")
    entries = json.loads(results.read_text())
    results.write_text(json.dumps(entries[:3]))
    cap(
        *("evaluate", "--predictions", results, "--cache", cache.path, "--no-meteor"),
        *("--images", images, "--gallery", tmp_path / "page"),
    )
    of_file = data_of(tmp_path / "page" / "index.html")["photos"]
    assert [photo["name"] for photo in of_file] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [text_of(photo["captions"][0]) for photo in of_file] == [
        entry["caption"] for entry in entries[:3]
    ]
    assert all("references" in photo and "cider" in photo for photo in of_file)
    bundle = load_bundle(run)
    row = int(cache.rows_with(DONE)[0])
    words = entries[0]["caption"].split()
    assert text_of(shown[cache.paths[row]]["captions"][0]) == sentence(words, bundle.vocabulary)


def test_what_cannot_be_shown_is_said_before_anything_is_done(
    made: tuple[FeatureCache, Path], photos: Path, tmp_path: Path
) -> None:
    cache, run = made
    of_model = ["evaluate", "--model", run, "--cache", cache.path]
    page = ["--gallery", tmp_path / "page"]
    for arguments, code, message in (
        ([*of_model, *page], 2, "--gallery needs --images, the folder of the cache's photos"),
        ([*of_model, "--images", photos], 2, "--images has no effect without --gallery"),
        (["evaluate", "--human", "--cache", cache.path, *page], 2, "not of people"),
        ([*of_model, *page, "--images", tmp_path], 1, f"{tmp_path}: holds no photo of"),
        (["predict", photos, "--model", run, "--gallery", photos], 1, "something else than a gal"),
        (["predict", photos, "--model", run, "--gallery", cache.path], 1, "is a feature cache"),
    ):
        out, err = cap(*arguments, code=code)
        assert out == ""
        assert message in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "page").exists()


def test_thumbnails_are_upright_small_copies_without_the_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a maker of cameras"  # turned by 90 degrees
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).resize((1200, 900)).save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(pixels).save(tmp_path / "b.png")
    (tmp_path / "c.jpg").write_bytes(b"no photo")
    thumbnails = Thumbnails(tmp_path, 2)
    for number, name in enumerate(("a.jpg", "b.png", "c.jpg", "absent.jpg")):
        thumbnails.add(number, tmp_path / name)
    found = thumbnails.finish()
    assert (found[0].width, found[0].height) == (LONG_SIDE * 3 // 4, LONG_SIDE)
    assert (found[1].width, found[1].height) == (40, 30)
    assert found[2].error == "not an image, or of an unknown format"
    assert found[3].error == "file not found"
    assert sorted(path.name for path in tmp_path.glob("0*")) == ["000000.jpg", "000001.jpg"]
    assert found[0].size_bytes == (tmp_path / "000000.jpg").stat().st_size
    assert b"a maker of cameras" not in (tmp_path / "000000.jpg").read_bytes()


def test_a_full_disk_or_a_dead_drive_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photo(tmp_path / "a.jpg", 0)
    thumbnails = Thumbnails(tmp_path / "absent", 1)
    for number in range(3):
        thumbnails.add(number, tmp_path / "a.jpg")
    with pytest.raises(WriteError, match=r"000000\.jpg: cannot write \(No such file"):
        thumbnails.finish()
    os.mkfifo(tmp_path / "dead")
    monkeypatch.setattr(
        "pipeline.gallery.thumbnails.read_file",
        lambda path, reservation: (tmp_path / "dead").read_bytes(),  # waits for a writer
    )
    hanging = Thumbnails(tmp_path, 1, stall_s=0.5)
    hanging.add(0, tmp_path / "a.jpg")
    with pytest.raises(StalledError, match="no photo came from the disk for"):
        hanging.finish()
    (tmp_path / "dead").write_bytes(b"")  # lets the thread end


def test_a_gallery_replaces_only_a_gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_INSIDE_BYTES", 0)
    write_photo(tmp_path / "a.jpg", 0)
    out = tmp_path / "new" / "out"
    assert write(out, tmp_path / "a.jpg").startswith(
        f"{out}/index.html: a gallery of 1 photo; it needs the folder thumbnails-1 beside it ("
    )
    write(out, tmp_path / "a.jpg", tmp_path / "a.jpg")
    assert entries(out) == [
        *(".cap-gallery", "index.html", "thumbnails-2"),
        *("thumbnails-2/000000.jpg", "thumbnails-2/000001.jpg"),
    ]
    for name in ("notes.txt", "thumbnails-2/x.png", "thumbnails-7", "thumbnails-8"):
        if name == "thumbnails-8":
            (out / name).symlink_to(tmp_path)
        else:
            (out / name).write_text("mine")
        before = entries(out)
        with pytest.raises(GalleryError, match=f"{name}, which no gallery wrote"):
            write(out, tmp_path / "a.jpg")
        assert entries(out) == before
        (out / name).unlink()
    with pytest.raises(GalleryError, match=r"something else than a gallery \(a\.jpg\)"):
        write(tmp_path, tmp_path / "a.jpg")
    with pytest.raises(GalleryError, match="is no folder"):
        write(tmp_path / "a.jpg", tmp_path / "a.jpg")
    with Gallery(out), pytest.raises(GalleryError, match="another cap process writes a gallery"):
        Gallery(out)
    assert "thumbnails-2" in entries(out)  # an unfinished gallery leaves the one before


def test_an_error_leaves_no_new_folder(tmp_path: Path) -> None:
    write_photo(tmp_path / "a.jpg", 0)
    begun = []

    def interrupted() -> None:
        with Gallery(tmp_path / "out") as gallery:
            begun.extend(gallery._thumbnails._threads)
            for _ in range(40):
                gallery.add(SHOWN, tmp_path / "a.jpg")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert entries(tmp_path) == ["a.jpg"]
    assert begun
    assert not any(thread.is_alive() for thread in begun)


def test_a_killed_gallery_leaves_the_page_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_INSIDE_BYTES", 0)
    write_photo(tmp_path / "a.jpg", 0)
    write(tmp_path / "out", tmp_path / "a.jpg")
    before = (tmp_path / "out/index.html").read_bytes()
    process = os.fork()  # a new one would take seconds to import torch
    if process == 0:
        gallery = Gallery(tmp_path / "out")
        for _ in range(3):
            gallery.add(SHOWN, tmp_path / "a.jpg")
        gallery._thumbnails.finish()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / "out/index.html").read_bytes() == before
    assert {"thumbnails-1/000000.jpg", "thumbnails-2/000002.jpg"} <= {*entries(tmp_path / "out")}
    write(tmp_path / "out", tmp_path / "a.jpg")
    assert entries(tmp_path / "out")[2:] == ["thumbnails-3", "thumbnails-3/000000.jpg"]


def test_data_in_the_page_cannot_end_its_script() -> None:
    odd = "</script><!-- \u2028\u2029 &amp; \udcff 狗"
    text = embedded_json([odd])
    assert json.loads(text) == [odd]
    assert not set(text) & set("<>&\u2028\u2029\udcff")
    text.encode("utf-8")


def test_names_lose_the_folder_that_all_share() -> None:
    assert module._short_names(["/home/me/x/a.jpg", "/home/me/x/y/b.jpg"]) == ["a.jpg", "y/b.jpg"]
    assert module._short_names(["x/a.jpg"]) == ["a.jpg"]
    assert module._short_names(["a.jpg", "x/b.jpg"]) == ["a.jpg", "x/b.jpg"]
    assert module._short_names(["/x/a.jpg", "b.jpg"]) == ["/x/a.jpg", "b.jpg"]
    assert module._short_names([]) == []
