"""`cap bench cache`: writing and reading a cache, compared with h5py and with copies in memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from cache.record import EncoderRecord, Skeleton, Strings, no_captions
from cache.store import DIGEST_BYTES, FeatureCache, open_cache
from cache.writer import open_writer

_BATCH_ROWS = 128
_WRITE_ROWS = 1024
_REPEATS = 5


@dataclass(frozen=True)
class CacheBench:
    """Times and rates of one run, each the best of several rounds."""

    rows: int
    size_mb: float  # of the features, 10^6 bytes
    write_rows_per_s: float  # by the writer, with checksums and syncing
    open_s: float  # with the check of the seal and reading the metadata
    batch_us: float  # 128 random rows of the cache
    h5py_batch_us: float  # the same rows by h5py's fancy indexing on a chunked file
    load_mb_per_s: float  # all features into new memory
    memcpy_mb_per_s: float  # the same amount between arrays in memory

    @property
    def batch_ratio(self) -> float:
        return self.h5py_batch_us / self.batch_us

    @property
    def load_share(self) -> float:
        return self.load_mb_per_s / self.memcpy_mb_per_s

    def table(self) -> str:
        return "\n".join(
            (
                f"{self.rows:,} photos, {self.size_mb:,.0f} MB of features",
                f"write                   {self.write_rows_per_s:>10,.0f} rows/s",
                f"open                    {self.open_s * 1000:>10,.1f} ms",
                f"128 random rows         {self.batch_us:>10,.0f} us",
                f"  by h5py, chunked      {self.h5py_batch_us:>10,.0f} us"
                f"   ({self.batch_ratio:,.0f} times as long)",
                f"load all                {self.load_mb_per_s:>10,.0f} MB/s",
                f"  memory to memory      {self.memcpy_mb_per_s:>10,.0f} MB/s"
                f" ({self.load_share:.0%} of it reached)",
            )
        )


def bench_cache(rows: int, feature_dim: int = 2048) -> CacheBench:
    """Time a cache and a chunked HDF5 file of the same features, in a temporary folder.

    The files are read from the page cache, as in the second epoch of a training run.
    """
    with tempfile.TemporaryDirectory(prefix="cap-bench-") as folder:
        random = np.random.default_rng(0)
        block = random.standard_normal((_WRITE_ROWS, 1, feature_dim)).astype(np.float16)
        write_s = _write_cache(Path(folder) / "cache.h5", rows, block)
        with h5py.File(Path(folder) / "chunked.h5", "w") as file:
            features = file.create_dataset("features", (rows, feature_dim), "<f2", chunks=True)
            for start in range(0, rows, _WRITE_ROWS):
                count = min(_WRITE_ROWS, rows - start)
                features[start : start + count] = block[:count, 0]
        started = time.perf_counter()
        cache = open_cache(Path(folder) / "cache.h5")
        open_s = time.perf_counter() - started
        with h5py.File(Path(folder) / "chunked.h5", "r") as file:
            return _time_reads(cache, file["features"], rows / write_s, open_s)


def _write_cache(path: Path, rows: int, block: NDArray[np.float16]) -> float:
    """Write a cache of `rows` rows; returns the seconds from the first row to the last sync."""
    names = Strings.pack(f"COCO_train2014_{row:012d}.jpg" for row in range(rows))
    encoder = EncoderRecord(
        backbone="bench",
        weights="none",
        weights_sha256="0" * 64,
        feature_dim=block.shape[2],
        image_size=224,
        views=("full",),
        preprocessing="none",
        precision="float32",
    )
    skeleton = Skeleton(names, names, no_captions(), encoder, batch_rows=32)
    digests = np.zeros((len(block), DIGEST_BYTES), np.uint8)
    with open_writer(path, skeleton, library_versions={}) as writer:
        started = time.perf_counter()
        for start in range(0, rows, len(block)):
            count = min(len(block), rows - start)
            writer.write(np.arange(start, start + count), block[:count], digests[:count])
        writer.flush()
        return time.perf_counter() - started


def _time_reads(
    cache: FeatureCache, chunked: h5py.Dataset, write_rows_per_s: float, open_s: float
) -> CacheBench:
    rows, size = len(cache), cache.features.nbytes
    random = np.random.default_rng(1)
    batch = np.sort(random.choice(rows, min(_BATCH_ROWS, rows), replace=False))
    source = np.ones(cache.features.shape, np.float16)
    target = np.zeros_like(source)

    def seconds(run: Callable[[], object], count: int = 1) -> float:
        started = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - started) / count

    best = [float("inf")] * 4
    for _ in range(_REPEATS):
        round_s = (
            seconds(lambda: cache.features[batch], 100),
            seconds(lambda: chunked[batch], 2),
            seconds(cache.load_features),
            seconds(lambda: np.copyto(target, source)),
        )
        best = [min(pair) for pair in zip(best, round_s, strict=True)]
    return CacheBench(
        rows=rows,
        size_mb=size / 1e6,
        write_rows_per_s=write_rows_per_s,
        open_s=open_s,
        batch_us=best[0] * 1e6,
        h5py_batch_us=best[1] * 1e6,
        load_mb_per_s=size / best[2] / 1e6,
        memcpy_mb_per_s=size / best[3] / 1e6,
    )
