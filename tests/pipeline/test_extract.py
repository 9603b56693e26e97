from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.record import CacheError
from cache.store import DONE, PENDING, open_cache
from pipeline.encoder.errors import EncoderError
from pipeline.encoder.networks import torchvision_networks
from pipeline.encoder.weights import load_backbone
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.device_workers import WorkerError
from pipeline.extraction.extract import extract
from pipeline.extraction.fill import Notice, Progress
from pipeline.photos.preprocessing import BICUBIC, IMAGENET, Preprocessing
from tests.conftest import write_photo
from tests.pipeline.extraction_process import run_extraction


def config(photos: Path, out: Path, **changes: object) -> ExtractConfig:
    settings = {
        "images": photos,
        "out": out,
        "captions": photos / "captions.txt",
        "backbone": "resnet18",
        "weights": "random",
        "image_size": 64,
        "batch_size": 4,
    }
    return ExtractConfig(**(settings | changes))  # type: ignore[arg-type]


def run(photos: Path, out: Path, **changes: object) -> tuple[Progress, list[str]]:
    reports = list(extract(config(photos, out, **changes)))
    assert isinstance(reports[-1], Progress)
    return reports[-1], [report.text for report in reports if isinstance(report, Notice)]


def test_extraction_sets_bad_photos_aside_and_finishes(photos: Path, tmp_path: Path) -> None:
    last, _ = run(photos, tmp_path / "x.h5")
    assert (last.done, last.unreadable, last.total, last.new) == (11, 1, 12, 12)
    cache = open_cache(tmp_path / "x.h5")
    assert cache.errors() == [("e.jpg", "not an image, or of an unknown format")]
    assert cache.features[cache.rows_with(DONE)].astype(np.float32).std() > 0
    assert cache.captions.by_row(12)[0] == ["A photo, number a, of coarse noise .", "Noise a ."]


def test_a_finished_extraction_is_not_done_again(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "x.h5")
    before = (tmp_path / "x.h5").read_bytes()
    last, _ = run(photos, tmp_path / "x.h5")
    assert last.new == 0
    assert (tmp_path / "x.h5").read_bytes() == before


def test_a_closed_extraction_keeps_what_is_done_and_goes_on(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "whole.h5")
    for _ in range(3):
        reports = extract(config(photos, tmp_path / "x.h5"))
        for report in reports:
            if isinstance(report, Progress) and report.new >= 4:
                break
        reports.close()
    last, _ = run(photos, tmp_path / "x.h5")
    assert last.new < 12
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_going_on_keeps_the_batch_size_and_so_the_bytes(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "whole.h5")
    reports = extract(config(photos, tmp_path / "x.h5"))
    next(report for report in reports if isinstance(report, Progress))
    reports.close()
    _, notices = run(photos, tmp_path / "x.h5", batch_size=3)
    assert notices[-1:] == ["continuing with the cache's own batch size, 4"]
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_killed_extraction_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL at 30 random moments, from before the file exists to its last row."""
    for seed in range(160):
        write_photo(tmp_path / "photos" / f"{seed:03d}.jpg", seed)
    # The fork server has everything imported and loaded, so its children start at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.pipeline.extraction_server"])

    def start(out: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=run_extraction, args=(tmp_path / "photos", out))
        process.start()
        return process

    for name in ("first.h5", "whole.h5"):  # the second time, without the server's start
        started = time.perf_counter()
        whole = start(tmp_path / name)
        while whole.is_alive() and not (tmp_path / name).exists():
            time.sleep(0.001)
        until_file_s = time.perf_counter() - started
        whole.join()
        assert whole.exitcode == 0
        whole_s = time.perf_counter() - started
    chance = random.Random(0)
    attempts = kills = partly = 0
    while kills < 30:
        attempts += 1
        assert attempts < 300  # else most runs ended before they were killed
        process = start(tmp_path / "x.h5")
        # One kill in five comes before or while the file is made, the others while it is filled.
        # Runs that continue have less to do than the measured one.
        latest_s = until_file_s + 0.6 * (whole_s - until_file_s)
        time.sleep(chance.uniform(until_file_s if attempts % 5 else 0, latest_s))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if (tmp_path / "x.h5").exists():
            left = len(open_cache(tmp_path / "x.h5", allow_pending=True).rows_with(PENDING))
            partly += 0 < left < 160
            if not left:
                assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
                (tmp_path / "x.h5").unlink()
    assert partly >= 6
    last = start(tmp_path / "x.h5")
    last.join()
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_another_command_is_refused_naming_the_field(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "x.h5")
    for changes, message in (
        ({"backbone": "resnet34"}, "backbone resnet18, not resnet34"),
        ({"image_size": 96}, "image_size 64, not 96"),
        ({"limit": 5}, "12 photos, not 5"),
        ({"captions": None}, "12 photos, not|other captions"),
    ):
        with pytest.raises(CacheError, match=message):
            run(photos, tmp_path / "x.h5", **changes)
    last, _ = run(photos, tmp_path / "x.h5", limit=5, overwrite=True)
    assert last.total == 5


def test_unreadable_photos_are_retried_when_asked(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for seed in range(5):
        write_photo(folder / f"{seed}.jpg", seed)
    run(folder, tmp_path / "whole.h5", captions=None)
    good = (folder / "3.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(good[:200])
    last, _ = run(folder, tmp_path / "x.h5", captions=None)
    assert last.unreadable == 1
    (folder / "3.jpg").write_bytes(good)
    last, _ = run(folder, tmp_path / "x.h5", captions=None)
    assert last.unreadable == 1
    last, notices = run(folder, tmp_path / "x.h5", captions=None, retry_unreadable=True)
    assert (last.done, last.new, notices) == (5, 1, ["trying 1 unreadable photos again"])
    assert (tmp_path / "x.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_files_that_are_no_photos_never_stop_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    write_photo(folder / "a.jpg", 0)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (tmp_path / "captions.txt").write_text(
        "".join(f"{name}.jpg,A caption\n" for name in ("a", "pipe", "gone"))
    )
    run(folder, tmp_path / "x.h5", captions=tmp_path / "captions.txt")
    assert dict(open_cache(tmp_path / "x.h5").errors()) == {
        "pipe.jpg": "not a regular file",
        "gone.jpg": "file not found",
    }


def test_several_views_are_stored_side_by_side(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "full.h5")
    run(photos, tmp_path / "both.h5", views=("full", "flip"))
    full, both = open_cache(tmp_path / "full.h5"), open_cache(tmp_path / "both.h5")
    assert both.features.shape == (12, 2, 512)
    close = np.abs(both.features[:, 0] - full.features[:, 0]).max()
    assert close < 0.02
    assert not np.allclose(both.features[0, 1], both.features[0, 0])


def test_missing_weights_leave_no_file_behind(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="no such weights file"):
        run(photos, tmp_path / "x.h5", weights="absent.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_wrong_features_stop_the_run_before_they_are_stored(
    devices: str, photos: Path, tmp_path: Path
) -> None:
    """Finite weights whose activations overflow to NaN, which a fused ReLU turns into zeros."""
    state = load_backbone("resnet18", "random").network.state_dict()
    state["layer2.0.bn1.weight"].fill_(3e38)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        (EncoderError, WorkerError), match=r"[a-i]\.jpg: resnet18 with .* not finite"
    ):
        run(photos, tmp_path / "x.h5", weights=str(tmp_path / "w.pth"), device=devices)
    assert not open_cache(tmp_path / "x.h5", allow_pending=True).status.any()


def test_photos_without_features_are_photos(photos: Path, tmp_path: Path) -> None:
    """A network whose features really are zero."""
    state = load_backbone("resnet18", "random").network.state_dict()
    for name in (
        "1.bn2.weight",
        "1.bn2.bias",
        "0.bn2.weight",
        "0.bn2.bias",
        "0.downsample.1.weight",
        "0.downsample.1.bias",
    ):
        state[f"layer4.{name}"].zero_()
    torch.save(state, tmp_path / "w.pth")
    last, _ = run(photos, tmp_path / "x.h5", weights=str(tmp_path / "w.pth"))
    assert last.done == 11
    assert not open_cache(tmp_path / "x.h5").features.any()


def shufflenet_wants(monkeypatch: pytest.MonkeyPatch, preprocessing: Preprocessing) -> None:
    monkeypatch.setattr(
        torchvision_networks, "published_preprocessing", lambda *_: (preprocessing, 224)
    )


def test_a_cache_from_before_filters_followed_the_networks_goes_on_as_it_was_made(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"backbone": "shufflenet_v2_x0_5", "limit": 2}
    run(photos, tmp_path / "old.h5", **settings)
    assert open_cache(tmp_path / "old.h5").encoder.preprocessing == str(IMAGENET)
    shufflenet_wants(monkeypatch, Preprocessing(BICUBIC))
    last, _ = run(photos, tmp_path / "old.h5", **settings)
    assert last.new == 0
    last, _ = run(photos, tmp_path / "more.h5", reuse=tmp_path / "old.h5", **settings)
    assert (last.new, last.copied) == (0, 2)
    run(photos, tmp_path / "new.h5", **settings)
    assert open_cache(tmp_path / "new.h5").encoder.preprocessing == str(Preprocessing(BICUBIC))


def test_a_cache_of_wrongly_normalized_pixels_is_refused(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"backbone": "shufflenet_v2_x0_5", "limit": 2}
    run(photos, tmp_path / "old.h5", **settings)
    half = (0.5, 0.5, 0.5)
    shufflenet_wants(monkeypatch, Preprocessing(mean=half, std=half))
    with pytest.raises(CacheError, match="preprocessing"):
        run(photos, tmp_path / "old.h5", **settings)
