"""The benchmarks run and measure what they say; how fast anything is, is not a test's business."""

from __future__ import annotations

import json

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
