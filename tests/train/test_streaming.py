"""Training on features that pass through memory, a window at a time."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cache.derived.catalogue import write_catalogue
from cache.record import CacheError, Shard, Skeleton, Strings, photos_sha256, texts_sha256
from cache.store import FeatureCache, open_cache
from cache.writer import open_writer
from tests.conftest import MakeCache, record
from tests.train.runs import WORDS, config, log_lines, same, weights
from train.captions.caption_set import caption_set, captioned_photos
from train.captions.numbering import build_caption_table
from train.captions.streaming.held import hold
from train.captions.streaming.memory import FeatureMemory, feature_memory
from train.captions.streaming.stream import FeatureStream
from train.captions.streaming.window import Layout, WindowedOrder, most_moved
from train.captions.vocabulary import build_vocabulary
from train.config import TrainConfig, WindowSize
from train.fit.record.run_folder import TrainError
from train.fit.reports import Started
from train.fit.run import train
from train.option import SettingError

CPU = torch.device("cpu")
PHOTOS = 90
STREAMED: dict[str, Any] = {"window": "50%", "batch_size": 4, "save_every": 16, "epochs": 2}


def captions_of_photos() -> list[list[str]]:
    random = np.random.default_rng(0)
    return [
        [" ".join(random.choice(WORDS, random.integers(2, 9))) for _ in range(random.integers(4))]
        for _ in range(PHOTOS)
    ]


@pytest.fixture
def cache(make_cache: MakeCache) -> FeatureCache:
    """Photos with no to three captions each, and two views."""
    return make_cache(captions_of_photos(), views=("flip", "full"))


def shards(folder: Path, whole: FeatureCache, cuts: Sequence[int]) -> list[Path]:
    """The rows of a cache as shards."""
    texts = captions_of_photos()
    ids, paths = list(whole.image_ids), list(whole.paths)
    table = whole.captions
    bounds = [0, *cuts, len(whole)]
    files = []
    for number in range(len(bounds) - 1):
        part = slice(bounds[number], bounds[number + 1])
        shard = Shard(
            number + 1,
            len(bounds) - 1,
            part.start,
            len(whole),
            photos_sha256(whole.image_ids, whole.paths),
            texts_sha256(table.texts, table.rows),
        )
        skeleton = Skeleton(
            image_ids=Strings.pack(ids[part]),
            paths=Strings.pack(paths[part]),
            captions=build_caption_table(texts[part]),
            encoder=record(views=("flip", "full")),
            batch_rows=2,
            shard=shard,
        )
        files.append(folder / f"s{number + 1}.h5")
        with open_writer(files[-1], skeleton, library_versions={}) as writer:
            rows = np.arange(part.start, part.stop)
            writer.copy(rows - part.start, whole, rows)
    return files


@pytest.fixture
def catalogue(tmp_path: Path, cache: FeatureCache) -> Path:
    write_catalogue(shards(tmp_path, cache, [20, 52]), tmp_path / "x.catalogue")
    return tmp_path / "x.catalogue"


def run(made: TrainConfig) -> list[Any]:
    return list(train(made))


def test_every_caption_gets_the_features_of_its_photo(cache: FeatureCache, catalogue: Path) -> None:
    for opened in (cache, open_cache(catalogue)):
        photos, counts = captioned_photos(opened)
        layout = Layout(4, 5, 2)
        moved = most_moved(counts, 7, layout.passes)
        stream = FeatureStream(opened, photos, layout, moved, CPU)
        vocabulary = build_vocabulary(opened.captions, 1)
        captions = caption_set(opened, vocabulary, device=CPU, max_length=50, features_from=stream)
        rows = captions.feature_rows
        photo_of = np.searchsorted(photos, rows).astype(np.int32)
        order = WindowedOrder(photo_of, len(photos), stream.layout, 7, captions.lengths)
        seen: list[int] = []
        for epoch in range(2):
            for window in stream.through(order.windows(seed=0, epoch=epoch, views=2)):
                for chosen, views in window.steps:
                    assert views is not None
                    got = captions.features_of(torch.from_numpy(chosen), torch.from_numpy(views))
                    expected = cache.features[rows[chosen], views]
                    assert np.array_equal(got.numpy(), expected)
                    of_photos = captions.photo_features(rows[chosen], views)
                    assert np.array_equal(of_photos.numpy(), expected)
                    seen += chosen.tolist()
        assert sorted(seen) == sorted(2 * list(range(len(captions))))
        # Also of photos outside of the window.
        views = np.arange(len(rows)) % 2
        outside = captions.photo_features(rows, views).numpy()
        assert np.array_equal(outside, cache.features[rows, views])
        assert stream.size_bytes == 2 * (20 + 6) * 2 * 8 * 2


def test_only_the_photos_of_validation_are_held(cache: FeatureCache, catalogue: Path) -> None:
    opened = open_cache(catalogue)
    rows = np.arange(10, 30)
    photos, _ = captioned_photos(opened, rows)
    held = hold(opened, photos, CPU)
    captions = caption_set(
        opened,
        build_vocabulary(opened.captions, 1),
        rows=rows,
        device=CPU,
        max_length=50,
        features_from=held,
    )
    assert len(held.features) == len(photos) < 20
    every = np.arange(len(captions))
    expected = cache.features[captions.feature_rows, 1]
    assert np.array_equal(
        captions.features_of(torch.from_numpy(every), torch.ones(len(every)).long()).numpy(),
        expected,
    )


def test_streamed_training_is_the_same_from_a_cache_and_from_a_catalogue(
    tmp_path: Path, cache: FeatureCache, catalogue: Path
) -> None:
    reports = run(config(cache, tmp_path / "a", **STREAMED))
    assert isinstance(reports[0], Started)
    assert reports[0].window.startswith("2.88 kB of features: ")
    assert "photos in shuffled blocks of" in reports[0].summary()
    run(dataclasses.replace(config(cache, tmp_path / "b", **STREAMED), from_cache=catalogue))
    for name in ("best.cap", "last.cap"):
        assert same(weights(tmp_path / "a" / name), weights(tmp_path / "b" / name))
    assert log_lines(tmp_path / "a") == log_lines(tmp_path / "b")


def test_a_catalogue_that_fits_trains_as_the_merged_cache(
    tmp_path: Path, cache: FeatureCache, catalogue: Path
) -> None:
    for name, path in (("a", cache.path), ("b", catalogue)):
        made = dataclasses.replace(config(cache, tmp_path / name, epochs=2), from_cache=path)
        assert run(made)[0].window == ""
    assert same(weights(tmp_path / "a/last.cap"), weights(tmp_path / "b/last.cap"))


@pytest.mark.parametrize(
    ("stop_after", "changes"),
    [
        (3, {"dropout": 0.3, "average_decay": 0.9}),
        (35, {"epochs": 1, "self_critical_epochs": 1, "self_critical_photos": 5}),
    ],
)
def test_a_resumed_streamed_run_reaches_the_same_weights(
    tmp_path: Path, cache: FeatureCache, stop_after: int, changes: dict[str, Any]
) -> None:
    changes = STREAMED | changes
    run(config(cache, tmp_path / "whole", **changes))
    reports = train(config(cache, tmp_path / "run", **changes))
    for count, _ in enumerate(reports):
        if count == stop_after:
            break
    reports.close()
    assert not [thread for thread in threading.enumerate() if "window" in thread.name]
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt")
    assert checkpoint["step"]
    # The window of the interrupted epoch counts, not what is asked for now.
    changes["window"] = "auto"
    run(config(cache, tmp_path / "run", resume=True, **changes))
    assert same(weights(tmp_path / "whole/last.cap"), weights(tmp_path / "run/last.cap"))


def test_an_interrupted_epoch_goes_on_in_its_own_order(tmp_path: Path, cache: FeatureCache) -> None:
    for window, other, message in (
        ("50%", "all", "was interrupted in an epoch with a window of the features; leave out"),
        ("all", "50%", "was interrupted in an epoch with all features in memory; leave out"),
    ):
        changes = STREAMED | {"window": window}
        reports = train(config(cache, tmp_path / window, **changes))
        for _ in range(4):
            next(reports)
        reports.close()
        with pytest.raises(TrainError, match=message):
            run(config(cache, tmp_path / window, resume=True, **(changes | {"window": other})))
    # Between epochs, the window may change.
    run(config(cache, tmp_path / "between", **(STREAMED | {"epochs": 1})))
    run(config(cache, tmp_path / "between", resume=True, **(STREAMED | {"window": "all"})))


def test_too_small_a_window_is_one_line(tmp_path: Path, cache: FeatureCache) -> None:
    for name, changes in (
        ("a", {"window": "100B"}),
        ("b", {"window": "5%"}),
        ("c", {"window": "50%", "self_critical_epochs": 1, "self_critical_photos": 30}),
    ):
        with pytest.raises(
            TrainError, match=r"--window: batches of \d+ need [\d.]+ (kB|bytes), for"
        ):
            next(train(config(cache, tmp_path / name, **(STREAMED | changes))))


def test_a_damaged_row_is_found_when_it_is_read(tmp_path: Path, catalogue: Path) -> None:
    shard = open_cache(tmp_path / "s2.h5")
    row = int(shard.captions.rows[5])
    region, name = shard.region("features"), shard.paths[row]
    with (tmp_path / "s2.h5").open("r+b") as file:
        file.seek(region.offset + row * region.size_bytes // region.shape[0])
        file.write(b"\x01\x02")
    made = config(open_cache(catalogue), tmp_path / "run", **STREAMED)
    with pytest.raises(CacheError, match=rf"1 of .* photos are damaged \(first: {name}"):
        run(made)


def test_a_cache_that_goes_away_while_training_is_named(tmp_path: Path, catalogue: Path) -> None:
    reports = train(config(open_cache(catalogue), tmp_path / "run", **STREAMED))
    next(reports)
    next(reports)
    os.rename(tmp_path / "s3.h5", tmp_path / "away.h5")
    with pytest.raises(CacheError, match=r"x\.catalogue: .*s3\.h5, which it lists, is not there"):
        list(reports)
    os.rename(tmp_path / "away.h5", tmp_path / "s3.h5")


def test_what_fits_is_in_memory_and_the_rest_is_streamed(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = cache.features.nbytes
    auto = WindowSize.parse("auto")
    monkeypatch.setattr("train.captions.streaming.memory.memory_bytes", lambda: 2 * size)
    assert feature_memory(auto, cache, CPU) == FeatureMemory(None)
    monkeypatch.setattr("train.captions.streaming.memory.memory_bytes", lambda: 2 * size - 2)
    memory = feature_memory(auto, cache, CPU)
    assert memory.size_bytes == (2 * size - 2) // 4
    assert memory.reason == "more than 50% of the 5.76 kB of memory"
    assert feature_memory(WindowSize.parse("all"), cache, CPU) == FeatureMemory(None)
    assert feature_memory(WindowSize.parse("100%"), cache, CPU) == FeatureMemory(None)
    assert feature_memory(WindowSize.parse("10%"), cache, CPU) == FeatureMemory(size // 10)
    assert feature_memory(WindowSize.parse("1kB"), cache, CPU) == FeatureMemory(1000)
    assert feature_memory(WindowSize.parse("1GB"), cache, CPU) == FeatureMemory(None)


def test_a_gpu_streams_what_does_not_fit_beside_the_decoder(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, gpu = cache.features.nbytes, torch.device("cuda", 0)
    auto = WindowSize.parse("auto")
    assert feature_memory(auto, cache, gpu) == FeatureMemory(None)  # so few that nothing is asked
    monkeypatch.setattr("train.captions.streaming.memory._SURELY_FITTING_BYTES", 0)
    for free, expected in ((2 * size, None), (size, size // 2)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _, free=free: (free, 10 * size))
        assert feature_memory(auto, cache, gpu).size_bytes == expected
    assert feature_memory(auto, cache, gpu).reason.endswith("that are free on cuda:0")


def test_sizes_of_windows_are_read() -> None:
    assert WindowSize.parse("auto") == WindowSize()
    assert WindowSize.parse("all") == WindowSize(everything=True)
    assert WindowSize.parse("1.5GB") == WindowSize(size_bytes=1_500_000_000)
    assert WindowSize.parse("20 MB") == WindowSize(size_bytes=20_000_000)
    assert WindowSize.parse("512kB") == WindowSize(size_bytes=512_000)
    assert WindowSize.parse("7") == WindowSize(size_bytes=7)
    assert WindowSize.parse("2.5%") == WindowSize(share=0.025)
    for text in ("", "0", "0%", "101%", "-1GB", "1 gb", "half", "1e9", "GB", "inf"):
        with pytest.raises(SettingError, match="is neither auto nor all"):
            WindowSize.parse(text)


@pytest.mark.gpu
def test_a_gpu_trains_on_the_same_windows(tmp_path: Path, cache: FeatureCache) -> None:
    """Every photo's features arrive in time, also where graphs read them."""
    gpu = torch.device("cuda")
    photos, counts = captioned_photos(cache)
    stream = FeatureStream(cache, photos, Layout(4, 5), most_moved(counts, 7), gpu)
    vocabulary = build_vocabulary(cache.captions, 1)
    captions = caption_set(cache, vocabulary, device=gpu, max_length=50, features_from=stream)
    rows = captions.feature_rows
    order = WindowedOrder(
        np.searchsorted(photos, rows).astype(np.int32), len(photos), stream.layout, 7
    )
    for epoch in range(3):
        pairs = []
        for window in stream.through(order.windows(seed=0, epoch=epoch, views=2)):
            for chosen, views in window.steps:
                assert views is not None
                indices = torch.from_numpy(chosen).cuda(), torch.from_numpy(views).cuda()
                pairs.append((captions.features_of(*indices), cache.features[rows[chosen], views]))
        for got, expected in pairs:
            assert np.array_equal(got.cpu().numpy(), expected)
    run(config(cache, tmp_path / "run", **(STREAMED | {"device": "cuda", "epochs": 4})))
