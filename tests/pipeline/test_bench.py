"""The benchmarks run and report what they measure. How fast anything is, is not tested."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from cache.errors import CapError
from pipeline.bench import beside
from pipeline.bench.captioning import predict
from pipeline.bench.jpegs import (
    MEAN_BYTES,
    PERIOD,
    write_bench_photos,
    write_coco_like_photos,
)
from pipeline.bench.peak_memory import tree_memory_mb
from pipeline.bench.training import train
from pipeline.photos.decoding import decode
from pipeline.photos.photo_file import read_photo
from tests.pipeline.test_captioner import trained
from tests.pipeline.test_cli import cap


def test_bench_cache_prints_rates_and_the_machine() -> None:
    out, err = cap("bench", "cache", "--photos", 300, "--json")
    result = json.loads(out)
    assert result["rows"] == 300
    assert result["size_mb"] == 300 * 2048 * 2 / 1e6
    assert result["batch_ratio"] == result["h5py_batch_us"] / result["batch_us"]
    assert "cores" in err
    out, _ = cap("bench", "cache", "--photos", 300)
    assert "128 random rows" in out


@pytest.mark.slow
def test_bench_train_prints_what_its_figures_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "bench_train", functools.partial(train.bench_train, steps=4))
    out, err = cap(
        "bench", "train", "--photos", 500, "--batch-size", 32, "--device", "cpu", "--json"
    )
    result = json.loads(out)
    assert {
        "plain_step_ms", "fast_step_ms", "ratio", "epoch_s", "limit_epoch_s", "peak_rss_mb",
        "device",
    } <= result.keys()  # fmt: skip
    assert result["steps_per_epoch"] == -(-2501 // 32)
    assert result["ratio"] == result["plain_step_ms"] / result["fast_step_ms"]
    assert result["limit_share"] == result["limit_step_ms"] / result["fast_step_ms"]
    assert result["plain_faults"] > 0
    assert result["plain_kept_ms"] > 0
    assert result["tokens_per_step"] / 32 == pytest.approx(12.5, abs=0.3)  # `<end>` included
    assert set(result["parts_ms"]) >= {"lstm forward", "backward", "optimizer"}
    assert "cores" in err


@pytest.mark.slow
def test_bench_predict_times_fresh_and_loaded_models() -> None:
    small = ("bench", "predict", "--backbone", "resnet18", "--photos", 8, "--cold-runs", 1)
    out, err = cap(*small, "--device", "cpu", "--json")
    result = json.loads(out)
    assert [row["beam_size"] for row in result["latencies"]] == [1, 3]
    for row in result["latencies"]:
        assert 0 < row["warm_p50_ms"] <= row["warm_p99_ms"]
        # A fresh process does the same work as a loaded model, and loads it first.
        assert row["warm_p50_ms"] / 1000 < row["cold_p50_s"] <= row["cold_p99_s"]
        assert row["photos_per_s"] > 0
        assert list(row["cold_parts_s"]) == ["interpreter", "imports", "load", "caption", "end"]
        assert all(seconds > 0 for seconds in row["cold_parts_s"].values())
        assert sum(row["cold_parts_s"].values()) == pytest.approx(row["cold_p50_s"])  # of one start
        assert list(row["warm_parts_ms"]) == ["decode", "encode", "search"]
        assert all(ms > 0 for ms in row["warm_parts_ms"].values())
    assert result["precision"] in ("float32", "bfloat16")
    assert "cores" in result["machine"]
    assert result["machine"] in err
    assert "captioning: 0/4 steps, making a model" in err
    assert "captioning: 4/4 steps" in err


def test_bench_predict_tells_what_it_is_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[int, int, str]] = []

    def stop_at_the_third(*arguments: object) -> None:
        if len(said) > 3:
            raise InterruptedError

    monkeypatch.setattr(predict, "write_bench_model", lambda *_: (Path("m.cap"), "float32"))
    monkeypatch.setattr(predict, "caption_afresh", stop_at_the_third)
    with pytest.raises(InterruptedError):
        predict.bench_predict(
            photos=1,
            cold_runs=2,
            device="cpu",
            progress=lambda done, total, _, note: said.append((done, total, note)),
        )
    assert said == [
        (0, 6, "making a model"),
        (1, 6, "cold start 1 of 4"),
        (2, 6, "cold start 2 of 4"),
        (3, 6, "cold start 3 of 4"),
    ]


def test_bench_predict_names_what_a_fresh_process_could_not_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    _, err = cap("bench", "predict", "--backbone", "shufflenet_v2_x0_5", "--photos", 8, code=1)
    assert "a fresh `cap predict` failed (it wrote no caption)" in err


def test_bench_serve_loses_no_request_and_names_the_parts() -> None:
    small = ("bench", "serve", "--backbone", "shufflenet_v2_x0_5", "--photos", 8, "--requests", 12)
    out, err = cap(*small, "--clients", 3, "--device", "cpu", "--json")
    result = json.loads(out)
    assert (result["lost"], result["requests"], result["clients"]) == (0, 12, 3)
    for times in (result["alone"], result["load"]):
        assert set(times["parts_ms"]) == {"upload", "decode", "wait", "encode", "search"}
        assert all(value >= 0 for value in times["parts_ms"].values())
        assert sum(times["parts_ms"].values()) < times["p99_ms"] * 1.5
        assert 0 < times["p50_ms"] <= times["p99_ms"]
    assert result["alone"]["batch"] == 1
    assert result["load"]["photos_per_s"] > 0
    assert result["captioner_p50_ms"] > 0
    assert "cores" in err


def test_bench_serve_names_what_the_server_could_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    _, err = cap("bench", "serve", "--backbone", "shufflenet_v2_x0_5", "--photos", 8, code=1)
    assert "a fresh `cap serve` failed (it said nothing)" in err


SMALL_EXTRACT = (
    *("bench", "extract", "--backbone", "shufflenet_v2_x0_5"),
    *("--rounds", 1, "--device", "cpu"),
)


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.bench.extract.PART_S", 0.0)  # each once


@pytest.mark.usefixtures("briefly")
def test_bench_extract_measures_every_part_and_the_whole() -> None:
    out, err = cap(*SMALL_EXTRACT, "--photos", 20, "--size", "96x64", "--json")
    result = json.loads(out)
    assert (result["photos"], result["source"], result["batch_rows"]) == (20, "96×64", 16)
    for part in (
        "read", "decode_one_thread", "decode_threads", "decode_processes", "resize",
        "plain_loop", "plain_backbone", "backbone", "end_to_end",
    ):  # fmt: skip
        assert result[f"{part}_per_s"] > 0
    assert result["decode_gpu_per_s"] is None
    assert result["decode_gpu_note"] == "the device is cpu"
    fastest = max(result["decode_threads_per_s"], result["decode_processes_per_s"])
    assert result["decode_per_s"] == fastest
    assert result["backbone_ratio"] == result["backbone_per_s"] / result["plain_backbone_per_s"]
    slowest = min(result["decode_per_s"], result["backbone_per_s"])
    assert result["slowest_share"] == result["end_to_end_per_s"] / slowest
    assert result["end_to_end_ratio"] == result["end_to_end_per_s"] / result["plain_loop_per_s"]
    assert result["start_s"] > 0.3  # a fresh process imports torch
    assert result["peak_memory_mb"] > 200
    assert result["peak_gpu_mb"] is None
    assert "cores" in err
    assert "writing 20 photos, 96×64, about 65.1 kB" in err


@pytest.mark.usefixtures("briefly")
def test_bench_extract_measures_on_photos_of_ones_own_and_leaves_them_alone(
    tmp_path: Path,
) -> None:
    images = tmp_path / "mine"
    images.mkdir()
    write_bench_photos(images, 6, 60, 40)
    (images / "note.jpg").write_text("no photo")
    before = {path: path.read_bytes() for path in images.iterdir()}
    out, _ = cap(*SMALL_EXTRACT, "--photos", 5, "--images", images)
    assert out.startswith(f"5 photos, of 7 in {images}, ")
    assert "decode on the GPU  none here           the device is cpu" in out.splitlines()
    assert {path: path.read_bytes() for path in images.iterdir()} == before


def test_bench_extract_names_what_it_cannot_measure(tmp_path: Path) -> None:
    _, err = cap("bench", "extract", "--size", "640", code=2)
    assert "640x480" in err
    _, err = cap("bench", "extract", "--size", "640x480", "--images", tmp_path, code=2)
    assert "sizes of their own" in err
    _, err = cap("bench", "extract", "--images", tmp_path, "--device", "cpu", code=1)
    assert err.splitlines()[-1] == f"error: {tmp_path}: no photos"


def test_bench_extract_says_when_the_disk_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=3_000_000))
    _, err = cap("bench", "extract", "--photos", 20, "--device", "cpu", code=1)
    line = err.splitlines()[-1]
    assert "MB, but 3.00 MB are free; ask for fewer" in line
    assert "set TMPDIR" in line


def test_the_memory_of_children_counts() -> None:
    code = "import time; block = bytearray(50_000_000); print(flush=True); time.sleep(60)"
    before = tree_memory_mb(os.getpid())
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        alone, together = tree_memory_mb(child.pid), tree_memory_mb(os.getpid())
        child.kill()
    assert 50 < alone < 150
    assert together - before > 49
    assert tree_memory_mb(child.pid) == 0


def test_photos_of_one_size_have_cocos_bytes_and_differ(tmp_path: Path) -> None:
    mean_bytes = write_bench_photos(tmp_path, 70, 640, 480)
    assert 0.9 < mean_bytes / 163_000 < 1.1
    paths = sorted(tmp_path.iterdir())
    assert all(path.stat().st_nlink == 1 for path in paths)
    files = [path.read_bytes() for path in paths]
    assert len(set(files)) == 70
    assert mean_bytes == sum(map(len, files)) / 70
    with Image.open(io.BytesIO(files[0])) as image:
        assert (image.size, image.mode) == ((640, 480), "RGB")
        pixels = np.asarray(image)
    fine = np.abs(np.diff(pixels.astype(int), axis=1)).mean()
    assert 1 < fine < 40  # neither flat nor white noise, whose neighbours differ by 85
    assert (decode(files[64]) == pixels).all()  # the same picture in another file
    assert (decode(files[1]) != pixels).any()


def counted(folder: Path) -> tuple[Counter[str], Counter[tuple[int, int]]]:
    """How many photos of a folder are of each kind, and of each size."""
    found: Counter[str] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    for path in folder.iterdir():
        with Image.open(path) as image:
            assert isinstance(image, JpegImagePlugin.JpegImageFile)
            sizes[image.size] += 1
            found[image.mode] += 1
            found["icc"] += "icc_profile" in image.info
            found["app1"] += any(name == "APP1" for name, _ in image.applist)
            found["turned"] += image.getexif().get(0x0112, 1) != 1
            found["progressive"] += "progressive" in image.info
            subsampling = JpegImagePlugin.get_sampling(image) if image.mode == "RGB" else 0
            found["4:2:0"] += subsampling == 2
    return found, sizes


def test_the_mix_has_cocos_sizes_bytes_and_metadata(tmp_path: Path) -> None:
    mean_bytes = write_coco_like_photos(tmp_path, PERIOD)
    assert 0.97 < mean_bytes / MEAN_BYTES < 1.03
    found, sizes = counted(tmp_path)
    assert found == {
        "RGB": 198, "L": 1, "icc": 86, "app1": 23, "turned": 2, "progressive": 4, "4:2:0": 10,
    }  # fmt: skip
    assert sizes.most_common(2) == [((640, 480), 49), ((640, 427), 16)]
    assert len(sizes) == 79
    for path in tmp_path.iterdir():
        assert not read_photo(path, 32, ("full",)).error


def test_real_photos_have_what_the_mix_has(sample_data: Path, tmp_path: Path) -> None:
    coco = sample_data / "coco/val2017"
    write_coco_like_photos(tmp_path, PERIOD)
    real, real_sizes = counted(coco)
    made, made_sizes = counted(tmp_path)
    assert {kind: made[kind] - real[kind] for kind in made} == {
        "RGB": 0,
        "L": 0,
        "icc": 0,
        "app1": 0,
        "turned": 2,
        "progressive": 4,
        "4:2:0": 10,  # not COCO's
    }
    assert len(made_sizes) == len(real_sizes)
    common = {size: count for size, count in real_sizes.items() if count > 1}
    assert {size: made_sizes[size] for size in common} == common


def test_bench_beside_runs_commands_alone_and_beside_busy_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    busy: list[tuple[str, int]] = []

    def run(command: str, folder: Path, backbone: str) -> float:
        assert len(list((folder / "photos").iterdir())) == 8
        own = Path("/proc/self/cmdline").read_bytes()
        commands = [own]
        while own in commands or b"" in commands:  # a child is not another program yet
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            commands = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children]
        counting = sum(beside._COUNTING.encode() in each for each in commands)
        busy.append((command, counting))
        return 3.0 if counting else 1.5

    monkeypatch.setattr(beside, "_run", run)
    monkeypatch.setattr(beside, "_rate", lambda count, *_: 10.0 + count)
    result = json.loads(
        cap("bench", "beside", "--processes", 3, "--rounds", 2, "--photos", 8, "--json")[0]
    )
    once = [(name, count) for name in ("extract", "train", "sweep", "predict") for count in (0, 3)]
    assert busy == once * 2
    assert [each["beside_s"] / each["alone_s"] for each in result["commands"]] == [2.0] * 4
    assert result["captioners"] == {"1": 11.0, "2": 12.0, "4": 14.0, "8": 18.0}
    table = cap("bench", "beside", "--rounds", 1, "--photos", 8)[0]
    assert "(2.0 times as long)" in table
    assert "8 captioners: 18.0 photos/s (164% of one)" in table


@pytest.mark.slow
def test_bench_beside_measures_captioners_of_several_processes(
    photos: Path, tmp_path: Path
) -> None:
    _, run = trained(photos, tmp_path)
    assert beside._rate(2, run, [str(photos / "a.jpg")], 0.2) > 0
    with pytest.raises(CapError, match="ended before it was ready"):
        beside._rate(1, tmp_path / "gone", [str(photos / "a.jpg")], 0.2)
