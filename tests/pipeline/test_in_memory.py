"""Photos that are no files give the captions of their files."""

from __future__ import annotations

import io
import multiprocessing
import os
import subprocess
import sys
import threading
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache.store import DONE, FeatureCache, open_cache
from pipeline.captioner.captioner import Captioner
from pipeline.captioner.forks import ForkError
from pipeline.captioner.predictions import CaptionError
from pipeline.photos.decoding import decode
from pipeline.photos.preprocessing import preprocess
from pipeline.photos.readers.in_memory import Photo, as_photos, read_any
from tests.conftest import ROOT
from tests.pipeline.test_captioner import trained
from train.config import SearchConfig, SearchError, SearchSettings

MODES = ["RGB", "L", "RGBA", "LA", "P", "CMYK", "1", "I;16"]


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureCache, Path]:
    return trained(photos, tmp_path_factory.mktemp("in-memory"))


@pytest.fixture(scope="module")
def captioner(run: tuple[FeatureCache, Path]) -> Captioner:
    return Captioner.load(run[1], device="cpu", beam_size=2)


@pytest.fixture
def paths(photos: Path, run: tuple[FeatureCache, Path]) -> list[Path]:
    cache = run[0]
    return [photos / cache.paths[row] for row in cache.rows_with(DONE).tolist()[:4]]


def picture(mode: str) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", MODES)
def test_an_image_has_the_pixels_of_its_file(mode: str) -> None:
    image = picture(mode)
    file = io.BytesIO()
    image.save(file, "TIFF" if mode == "CMYK" else "PNG")
    views = ("full", "flip", "center")
    expected = preprocess(file.getvalue(), 32, views, filter="bicubic")
    for photo in (image, Image.open(file), file.getvalue(), bytearray(file.getvalue())):
        read = read_any(photo, 32, views, "bicubic")
        assert read.pixels is not None
        assert (read.pixels == expected).all()


def test_an_image_is_turned_upright_and_stays_as_it_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    file = io.BytesIO()
    picture("RGB").save(file, "PNG", exif=exif)
    image = Image.open(file)
    read = read_any(image, 32, ("full",))
    assert read.pixels is not None
    assert (read.pixels == preprocess(file.getvalue(), 32)).all()
    assert image.size == (70, 50)


@pytest.mark.parametrize("gray", [False, True])
def test_an_array_has_the_pixels_of_its_file(gray: bool) -> None:
    image = picture("L" if gray else "RGB")
    file = io.BytesIO()
    image.save(file, "PNG")
    expected = preprocess(file.getvalue(), 32)
    array = np.array(image)
    frozen = array.copy()
    frozen.setflags(write=False)
    for photo in (array, frozen, np.array(np.fliplr(array))[:, ::-1]):
        read = read_any(photo, 32, ("full",))
        assert read.pixels is not None
        assert (read.pixels == expected).all()


def test_one_photo_is_a_list_of_one() -> None:
    array = np.zeros((4, 5, 3), np.uint8)
    for one in ("dog.jpg", Path("dog.jpg"), b"bytes", picture("L")):
        assert as_photos(one) == [one]
    assert len(as_photos(array)) == 1
    assert [photo.shape for photo in as_photos(np.stack([array] * 3))] == [(4, 5, 3)] * 3  # type: ignore[union-attr]
    assert as_photos(name for name in ("a", "b")) == ["a", "b"]


@pytest.mark.parametrize(
    "wrong",
    [
        3,
        None,
        [None],
        ["dog.jpg", 3],
        [["dog.jpg"]],
        np.zeros((4, 5, 3)),
        np.zeros((4, 5, 4), np.uint8),
        [np.zeros((2, 4, 5, 3), np.uint8)],
    ],
)
def test_what_is_no_photo_is_a_type_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match="a photo is a path"):
        as_photos(wrong)


def test_all_kinds_in_one_call(captioner: Captioner, paths: list[Path], tmp_path: Path) -> None:
    expected = captioner.caption(paths)
    kinds: list[Photo] = [
        str(paths[0]),
        paths[1].read_bytes(),
        Image.open(paths[2]),
        decode(paths[3].read_bytes()),
        b"no photo",
        tmp_path / "gone.jpg",
        np.zeros((0, 3), np.uint8),
    ]
    found = captioner.caption(kinds)
    assert [p.words for p in found[:4]] == [p.words for p in expected]
    assert [p.path for p in found] == [
        *(str(paths[0]), "photo 2", "photo 3", "photo 4", "photo 5"),
        *(str(tmp_path / "gone.jpg"), "photo 7"),
    ]
    assert [p.error for p in found[4:]] == [
        "not an image, or of an unknown format",
        "file not found",
        "an array without pixels",
    ]
    (alone,) = captioner.caption(str(paths[0]))
    assert alone.words == expected[0].words
    assert alone.log_prob == pytest.approx(sum(alone.captions[0].log_probs))
    # More than a batch: the order stays.
    many = captioner.caption([path.read_bytes() for path in paths] * 10)
    assert [p.words for p in many] == [p.words for p in expected] * 10
    assert captioner.caption([]) == []


def test_a_bad_photo_raises_if_asked(captioner: Captioner, paths: list[Path]) -> None:
    with pytest.raises(CaptionError, match="photo 2: not an image"):
        captioner.caption([paths[0], b"no photo"], errors="raise")
    with pytest.raises(CaptionError, match=r"gone\.jpg: file not found"):
        captioner.caption("gone.jpg", errors="raise")
    with pytest.raises(TypeError, match="errors is"):
        captioner.caption(paths, errors="ignore")  # type: ignore[arg-type]


def test_settings_of_the_search_are_arguments(
    run: tuple[FeatureCache, Path], captioner: Captioner, paths: list[Path]
) -> None:
    (three,) = captioner.caption(paths[0], captions=3)
    assert len(three.captions) == 3
    assert captioner.search_config.beam_size == 2  # as it was
    greedy = Captioner.load(run[1], device="cpu", beam_size=1)
    assert greedy.caption(paths) == captioner.caption(paths, beam_size=1)
    for call in (greedy.caption, greedy.stream):
        with pytest.raises(TypeError, match="beams"):
            call(paths, beams=3)  # type: ignore[call-arg]
        with pytest.raises(SearchError, match="has no effect"):
            call(paths, top_p=0.5)
    with pytest.raises(TypeError, match="beams"):
        Captioner.load(run[1], beams=3)  # type: ignore[call-arg]
    of_config = {field.name: field.type for field in fields(SearchConfig)}
    hints = {name: kind.__forward_arg__ for name, kind in SearchSettings.__annotations__.items()}
    assert hints == of_config


def test_threads_share_a_captioner(captioner: Captioner, paths: list[Path]) -> None:
    expected = captioner.caption(paths)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(captioner.caption(paths))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[p.words for p in each] for each in found] == [[p.words for p in expected]] * 4


def _use_after_fork(captioner: Captioner, run: Path, path: Path, said: Any) -> None:
    for use in (lambda: captioner.caption(path), lambda: Captioner.load(run, device="cpu")):
        try:
            use()
        except ForkError as error:
            said.put(str(error))
        else:
            said.put("")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_is_told_to_load_by_itself(
    run: tuple[FeatureCache, Path], captioner: Captioner, paths: list[Path]
) -> None:
    captioner.caption(paths)
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    child = context.Process(target=_use_after_fork, args=(captioner, run[1], paths[0], said))
    child.start()
    messages = [said.get(timeout=60), said.get(timeout=60)]
    child.join(60)
    assert all("load in each worker" in message for message in messages)
    captioner.caption(paths)  # the parent goes on


def test_importing_the_packages_loads_no_torch() -> None:
    code = (
        "import sys, pipeline, cache; assert 'torch' not in sys.modules\n"
        "assert 'numpy' not in sys.modules\n"
        "from cache import FeatureCache; assert 'torch' not in sys.modules\n"
        "from pipeline import Captioner; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", ["train.py", "cache.py"])
def test_a_file_that_hides_a_package_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    (tmp_path / "mine.py").write_text("import pipeline")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run_script(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *options, str(tmp_path / "mine.py")]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    failed = run_script()
    last = failed.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {tmp_path / name} hides the package {name[:-3]!r}")
    assert run_script("-P").returncode == 0


def test_rows_of_a_cache_by_number_and_name(run: tuple[FeatureCache, Path]) -> None:
    cache = open_cache(str(run[0].path))
    row = int(cache.rows_with(DONE)[1])
    expected = np.array(cache.features[row])
    for key in (row, row - len(cache), np.int64(row), cache.paths[row], cache.image_ids[row]):
        assert (cache[key] == expected).all()
    with pytest.raises(KeyError, match="nobody"):
        cache["nobody"]
    with pytest.raises(IndexError):
        cache[len(cache)]
    with pytest.raises(TypeError):
        cache[1.5]  # type: ignore[index]


def test_the_settings_dictionary_is_typed() -> None:
    assert typing.get_type_hints(SearchSettings)["beam_size"] is int
