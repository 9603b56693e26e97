"""Shared fixtures: small photos that are made on the spot, and the real sample data if there."""

from __future__ import annotations

import copy
import csv
import dataclasses
import functools
import gzip
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from cache.record import EncoderRecord, Skeleton, Strings
from cache.store import FeatureCache, open_cache
from cache.writer import open_writer
from pipeline.encoder.networks import random_weights
from pipeline.encoder.networks.headless import Headless
from train.captions.numbering import build_caption_table
from train.captions.script import TREEBANK
from train.fit.record.drawn_curves import DrawnCurves
from train.scores import meteor
from train.scores.java import package_folder

ROOT = Path(__file__).parent.parent

# A script's background jobs ignore Ctrl-C, and so would the processes that tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def sample_data() -> Path:
    folder = Path(os.environ.get("CAP_SAMPLE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no sample data (set CAP_SAMPLE_DATA)")
    return folder


def real_captions(data: Path, name: str) -> dict[str, list[str]]:
    """COCO's or Flickr8k's captions of the first 1,000 photos that have five."""
    found: dict[str, list[str]] = {}
    if name == "coco":
        notes = json.loads((data / "coco/captions_val2017.json").read_text())["annotations"]
        for note in notes:
            found.setdefault(str(note["image_id"]), []).append(note["caption"])
    else:
        with (data / "flickr8k/captions.txt").open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                found.setdefault(line["image"], []).append(line["caption"])
    return dict([item for item in found.items() if len(item[1]) == 5][:1000])


@pytest.fixture(scope="session")
def small_meteor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pycocoevalcap's folder as METEOR sees it, with a few paraphrases instead of millions, which
    take METEOR some seconds to load.
    """
    folder = tmp_path_factory.mktemp("pycocoevalcap")
    (folder / "meteor" / "data").mkdir(parents=True)
    shutil.copy(package_folder() / "meteor" / "meteor-1.5.jar", folder / "meteor")
    with gzip.open(folder / "meteor" / "data" / "paraphrase-en.gz", "wt") as file:
        file.write("0.5\nkittens\ncats\n0.5\nthe beach\nthe sand\n")
    return folder


@pytest.fixture
def small_meteor(small_meteor_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meteor, "package_folder", lambda: small_meteor_folder)


@pytest.fixture(scope="session", autouse=True)
def one_random_resnet18() -> Iterator[None]:
    """Drawing and measuring a random network takes a second; most tests of extraction need one."""
    drawn = random_weights.random_network

    @functools.cache
    def kept() -> tuple[Headless, str]:
        return drawn("resnet18")

    def copied(name: str) -> tuple[Headless, str]:
        return copy.deepcopy(kept()) if name == "resnet18" else drawn(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.encoder.weights.random_network", copied)
        yield


_PREPARE = DrawnCurves.prepare


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw no curves, which would take a second each. `drawing` undoes it."""
    monkeypatch.setattr(DrawnCurves, "prepare", lambda _: None)


@pytest.fixture
def drawing(no_curves: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DrawnCurves, "prepare", _PREPARE)


@pytest.fixture(autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


def write_photo(path: Path, seed: int, size: tuple[int, int] = (80, 60)) -> None:
    """A photo-like picture: coarse seeded noise, enlarged."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve JPEGs, a.jpg to l.jpg, one of them broken, and captions.txt with two captions each."""
    folder = tmp_path_factory.mktemp("photos")
    lines = ["image,caption"]
    for seed, letter in enumerate("abcdefghijkl"):
        write_photo(folder / f"{letter}.jpg", seed)
        lines.append(f'{letter}.jpg,"A photo, number {letter}, of coarse noise ."')
        lines.append(f"{letter}.jpg,Noise {letter} .")
    (folder / "e.jpg").write_bytes(b"this is no photo")
    (folder / "captions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def record(**changes: object) -> EncoderRecord:
    fields = {
        "backbone": "resnet18",
        "weights": "random",
        "weights_sha256": "ab" * 32,
        "feature_dim": 8,
        "image_size": 64,
        "views": ("full",),
        "preprocessing": "none",
        "precision": "float32",
    }
    return EncoderRecord(**(fields | changes))  # type: ignore[arg-type]


def skeleton(captions: list[list[str]], **changes: object) -> Skeleton:
    """changes: fields of the encoder's record, and the tokenizer."""
    tokenizer = str(changes.pop("tokenizer", TREEBANK))
    names = [f"{i:04d}.jpg" for i in range(len(captions))]
    return Skeleton(
        image_ids=Strings.pack(str(1000 + i) for i in range(len(captions))),
        paths=Strings.pack(names),
        captions=build_caption_table(captions, tokenizer),
        encoder=record(**changes),
        batch_rows=4,
    )


MakeCache = Callable[..., FeatureCache]


@pytest.fixture
def make_cache(tmp_path: Path) -> MakeCache:
    """make_cache(captions, features=None, name="x.h5", ids=None, digests=None, paths=None,
    **record fields or tokenizer) → a finished cache. digests: a number from 0 to 255 for each
    photo; 0, as by default: unknown.
    """

    def make(
        captions: list[list[str]],
        features: NDArray[np.floating] | None = None,
        name: str = "x.h5",
        ids: Sequence[str] | None = None,
        digests: Sequence[int] | None = None,
        paths: Sequence[str] | None = None,
        **changes: object,
    ) -> FeatureCache:
        made = skeleton(captions, **changes)
        if ids is not None:
            made = dataclasses.replace(made, image_ids=Strings.pack(ids))
        if paths is not None:
            made = dataclasses.replace(made, paths=Strings.pack(paths))
        shape = (len(captions), len(made.encoder.views), made.encoder.feature_dim)
        if features is None:
            features = np.random.default_rng(0).standard_normal(shape)
        with open_writer(tmp_path / name, made, library_versions={}) as writer:
            writer.write(
                np.arange(len(captions)),
                features.reshape(shape).astype(np.float16),
                np.repeat(np.array(digests or [0] * len(captions), np.uint8)[:, None], 16, 1),
            )
        return open_cache(tmp_path / name)

    return make
