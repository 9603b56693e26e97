"""The benchmarks run and measure what they say; how fast anything is, is not a test's business."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.test_cli import cap


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
        # A fresh process does all that a loaded model does, and loads it first.
        assert row["warm_p50_ms"] / 1000 < row["cold_p50_s"] <= row["cold_p99_s"]
        assert row["photos_per_s"] > 0
    assert result["precision"] in ("float32", "bfloat16")
    assert "cores" in result["machine"]
    assert result["machine"] in err


def test_bench_predict_names_what_a_fresh_process_could_not_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    _, err = cap("bench", "predict", "--backbone", "shufflenet_v2_x0_5", "--photos", 8, code=1)
    assert "a fresh `cap predict` failed (no caption came)" in err
