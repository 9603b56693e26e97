"""The benchmarks run and report what they measure. How fast anything is, is not tested."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.bench import predict
from pipeline.bench.jpegs import write_bench_photos
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


def test_bench_train_prints_what_its_figures_are_made_of() -> None:
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
    assert result["tokens_per_step"] / 32 == pytest.approx(12.5, abs=0.3)  # `<end>` included
    assert set(result["parts_ms"]) >= {"lstm forward", "backward", "optimizer"}
    assert "cores" in err


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

    monkeypatch.setattr(predict, "_write_model", lambda *_: (Path("m.cap"), "float32"))
    monkeypatch.setattr(predict, "_caption_afresh", stop_at_the_third)
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


def test_bench_extract_measures_every_part_and_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.bench.extract._PART_S", 0.0)  # each once
    arguments = ("bench", "extract", "--backbone", "resnet18", "--photos", 20, "--rounds", 1)
    out, err = cap(*arguments, "--size", "96x64", "--device", "cpu", "--json")
    result = json.loads(out)
    assert (result["photos"], result["width"], result["height"]) == (20, 96, 64)
    assert result["batch_rows"] == 16
    assert result["backbone_ratio"] == result["backbone_per_s"] / result["plain_backbone_per_s"]
    slowest = min(result["decode_per_s"], result["backbone_per_s"])
    assert result["slowest_share"] == result["end_to_end_per_s"] / slowest
    assert result["end_to_end_ratio"] == result["end_to_end_per_s"] / result["plain_loop_per_s"]
    assert 0 < result["start_s"] < result["first_batch_s"]
    assert result["peak_gpu_mb"] is None
    assert "cores" in err


def test_bench_extract_refuses_a_size_that_is_none() -> None:
    _, err = cap("bench", "extract", "--size", "640", code=2)
    assert "640x480" in err


def test_bench_photos_have_cocos_bytes_and_differ(tmp_path: Path) -> None:
    mean_bytes = write_bench_photos(tmp_path, 70, 640, 480)
    assert 0.9 < mean_bytes / 163_000 < 1.1
    files = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert len(files) == 70
    assert len(set(files)) == 64
    assert files[64:] == files[:6]
    with Image.open(io.BytesIO(files[0])) as image:
        assert (image.size, image.mode) == ((640, 480), "RGB")
        fine = np.abs(np.diff(np.asarray(image).astype(int), axis=1)).mean()
    assert 1 < fine < 40  # neither flat nor white noise, whose neighbours differ by 85
