"""`cap bench extract`: each part of an extraction alone, and the whole extraction, in one run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cache.create import size_text
from cache.store import open_cache
from pipeline.bench.extract_parts import Parts
from pipeline.bench.fresh_process import start_cap
from pipeline.bench.jpegs import (
    BYTES_PER_PIXEL,
    MEAN_BYTES,
    BenchError,
    write_bench_photos,
    write_coco_like_photos,
)
from pipeline.bench.peak_memory import PeakMemory
from pipeline.encoder.weights import load_backbone
from pipeline.photos.folder import list_photos
from train.device import resolve_device

_DEFAULT_PHOTOS = {"cpu": 192, "cuda": 8192}
PART_S = 2.0  # how long each part is measured in each round


@dataclass(frozen=True)
class ExtractBench:
    """Photos per second of each part and of the whole, each the best of several rounds."""

    backbone: str
    precision: str  # of the fast backbone, as chosen by the whole extraction
    device: str
    photos: int
    source: str  # of the photos
    photo_kb: float  # mean size of a file, 10^3 bytes
    batch_rows: int
    cores: int
    read_per_s: float  # reading files and digesting their bytes, on all cores
    # Reading, digesting, decoding and resizing: by one thread, by threads and by processes on all
    # cores.
    decode_one_thread_per_s: float
    decode_threads_per_s: float
    decode_processes_per_s: float
    decode_gpu_per_s: float | None  # decoding and resizing, from bytes in memory
    decode_gpu_note: str  # why there is none, or which photos it takes
    resize_per_s: float  # on all cores
    plain_loop_per_s: float  # decoding by Pillow, then encoding in eager float32, in turns
    plain_backbone_per_s: float  # eager float32, with pixels that are on the device already
    backbone_per_s: float  # fused, in `precision`, with pixels that are on the device already
    # `cap extract-features` in a fresh process: files to a cache.
    end_to_end_per_s: float  # from the first photo on
    start_s: float  # the rest of the time: from the prompt to the first photo, and the end
    peak_memory_mb: float  # of all its processes, 10^6 bytes
    peak_gpu_mb: float | None  # likewise, of the GPU

    @property
    def backbone_ratio(self) -> float:
        return self.backbone_per_s / self.plain_backbone_per_s

    @property
    def end_to_end_ratio(self) -> float:
        return self.end_to_end_per_s / self.plain_loop_per_s

    @property
    def decode_per_s(self) -> float:
        """The fastest way to decode."""
        ways = (self.decode_threads_per_s, self.decode_processes_per_s, self.decode_gpu_per_s or 0)
        return max(ways)

    @property
    def slowest_part(self) -> str:
        return "decoding" if self.decode_per_s < self.backbone_per_s else "backbone"

    @property
    def slowest_share(self) -> float:
        """The speed of the whole extraction as a share of its slowest part's."""
        return self.end_to_end_per_s / min(self.decode_per_s, self.backbone_per_s)

    def as_dict(self) -> dict[str, object]:
        ratios = (
            *("backbone_ratio", "end_to_end_ratio"),
            *("decode_per_s", "slowest_part", "slowest_share"),
        )
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in ratios}

    def table(self) -> str:
        threads = "1 thread" if self.cores == 1 else f"{self.cores} threads"
        processes = "1 process" if self.cores == 1 else f"{self.cores} processes"
        gpu = "" if self.peak_gpu_mb is None else f", {self.peak_gpu_mb:,.0f} MB on the GPU"
        rows: list[tuple[str, float | None, str]] = [
            ("read and digest", self.read_per_s, threads),
            ("decode on the CPU", self.decode_one_thread_per_s, "1 thread"),
            ("", self.decode_threads_per_s, threads),
            ("", self.decode_processes_per_s, processes),
            ("decode on the GPU", self.decode_gpu_per_s, self.decode_gpu_note),
            ("resize on the CPU", self.resize_per_s, threads),
            ("plain backbone", self.plain_backbone_per_s, ""),
            (
                "fast backbone",
                self.backbone_per_s,
                f"{self.backbone_ratio:.1f} times the plain one",
            ),
            ("plain loop", self.plain_loop_per_s, ""),
            (
                "end to end",
                self.end_to_end_per_s,
                f"{self.end_to_end_ratio:.1f} times the plain loop,"
                f" {self.slowest_share:.0%} of the {self.slowest_part} alone",
            ),
        ]
        lines = [
            f"{self.photos:,} photos, {self.source}, {self.photo_kb:.0f} kB each;"
            f" {self.backbone} in {self.precision}, batches of {self.batch_rows}"
        ]
        for name, rate, note in rows:
            rated = "none here         " if rate is None else f"{rate:>9,.1f} photos/s"
            lines.append(f"{name:<19}{rated}  {note}".rstrip())
        lines.append(f"{'start':<19}{self.start_s:>9,.1f} s")
        lines.append(f"{'peak memory':<19}{self.peak_memory_mb:>9,.0f} MB{gpu}")
        return "\n".join(lines)


def bench_extract(
    backbone: str = "resnet152",
    photos: int | None = None,
    *,
    size: tuple[int, int] | None = None,
    images: Path | None = None,
    device: str = "auto",
    rounds: int = 3,
    part_s: float | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> ExtractBench:
    """Measure with random weights; on JPEGs made in a temporary folder, or on photos of one's own.

    photos: how many; None for enough to take a second or more. size: (width, height) of all photos;
    None for COCO's mix. images: a folder; so many of its photos are drawn, and read where they are.
    rounds: of which the best counts. part_s: how long each part is measured. say: is told what
    comes next. Files are read from the page cache. Raises BenchError, EncoderError, DeviceError or
    FolderError.
    """
    chosen = resolve_device(device)
    count = photos or _DEFAULT_PHOTOS[chosen.type]
    asked_s = PART_S if part_s is None else part_s
    whole, found = list[_EndToEnd](), list[dict[str, float | None]]()
    parts: Parts | None = None
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cap-bench-")))
        files = _files(work, count, size, images, say)
        # From a file, so that a start includes loading weights, as usual, and not drawing them.
        weights = load_backbone(backbone, "random").network.state_dict()
        torch.save(weights, work / "weights.pth")
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}: extracting, then part by part")
            whole.append(_end_to_end(files, work, backbone, chosen))
            if parts is None:
                cache = open_cache(work / "cache.h5")
                parts = stack.enter_context(
                    Parts(files.paths, cache.encoder, cache.batch_rows, chosen, asked_s)
                )
            found.append(_rates(parts))
        assert parts is not None
        return ExtractBench(
            backbone=backbone,
            precision=cache.encoder.precision,
            device=str(chosen),
            photos=len(files.paths),
            source=files.source,
            photo_kb=files.mean_bytes / 1e3,
            batch_rows=cache.batch_rows,
            cores=parts.cores,
            decode_gpu_note=parts.gpu_decoder_note,
            end_to_end_per_s=max(run.photos_per_s for run in whole),
            start_s=min(run.start_s for run in whole),
            peak_memory_mb=max(run.host_mb for run in whole),
            peak_gpu_mb=whole[0].gpu_mb and max(run.gpu_mb or 0.0 for run in whole),
            **_best(found),
        )


def _rates(parts: Parts) -> dict[str, float | None]:
    return {
        "read_per_s": parts.read(),
        "decode_one_thread_per_s": parts.decode_by_threads(1),
        "decode_threads_per_s": parts.decode_by_threads(parts.cores),
        "decode_processes_per_s": parts.decode_by_processes(),
        "decode_gpu_per_s": parts.decode_on_gpu(),
        "resize_per_s": parts.resize(),
        "plain_loop_per_s": parts.plain_loop(),
        "plain_backbone_per_s": parts.plain_backbone(),
        "backbone_per_s": parts.fast_backbone(),
    }


@dataclass(frozen=True)
class _Files:
    """The photos to measure on."""

    folder: Path
    names: list[str] | None  # below the folder; None for all
    paths: list[Path]
    source: str
    mean_bytes: float


def _files(
    work: Path,
    count: int,
    size: tuple[int, int] | None,
    images: Path | None,
    say: Callable[[str], object],
) -> _Files:
    if images is not None:
        return _drawn(images, count)
    folder = work / "photos"
    folder.mkdir()
    source = "a mix like COCO's" if size is None else f"{size[0]}×{size[1]}"
    each = MEAN_BYTES if size is None else BYTES_PER_PIXEL * size[0] * size[1]
    say(f"writing {count:,} photos, {source}, about {size_text(round(count * each))}, to {folder}")
    if size is None:
        mean_bytes = write_coco_like_photos(folder, count)
    else:
        mean_bytes = write_bench_photos(folder, count, *size)
    return _Files(folder, None, sorted(folder.iterdir()), source, mean_bytes)


def _drawn(images: Path, count: int) -> _Files:
    """Photos of a folder, drawn with a fixed seed."""
    names = [name for name in list_photos(images).paths if _fits_a_line(name)]
    if not names:
        raise BenchError(f"{images}: no photos")
    drawn = sorted(random.Random(0).sample(names, min(count, len(names))))
    paths = [images / name for name in drawn]
    mean_bytes = sum(path.stat().st_size for path in paths) / len(paths)
    return _Files(images, drawn, paths, f"of {len(names):,} in {images}", mean_bytes)


def _fits_a_line(name: str) -> bool:
    """Whether a list of photos can name this one: UTF-8, without breaks and blanks at its ends."""
    return name.isprintable() and name == name.strip()


@dataclass(frozen=True)
class _EndToEnd:
    """One whole extraction."""

    photos_per_s: float
    start_s: float
    host_mb: float
    gpu_mb: float | None


def _end_to_end(files: _Files, work: Path, backbone: str, device: torch.device) -> _EndToEnd:
    """Extract in a fresh process. Raises BenchError if it fails."""
    arguments = ["--images", files.folder, "--out", work / "cache.h5", "--backbone", backbone]
    arguments += ["--weights", work / "weights.pth"]
    arguments += ["--device", device, "--overwrite", "--json"]
    if files.names is not None:
        (work / "names.txt").write_text("\n".join(files.names), encoding="utf-8")
        arguments += ["--only", work / "names.txt"]
    with PeakMemory(device) as peak:
        started = time.perf_counter()
        with start_cap("extract-features", *arguments) as process:
            peak.watch(process.pid)
            out, err = process.communicate()
        seconds = time.perf_counter() - started
    if process.returncode:
        reason = (err.strip().splitlines() or ["it wrote nothing"])[-1]
        raise BenchError(f"`cap extract-features` failed ({reason})")
    report = json.loads(out)
    return _EndToEnd(report["photos_per_s"], seconds - report["seconds"], peak.host_mb, peak.gpu_mb)


def _best(rounds: list[dict[str, float | None]]) -> dict[str, Any]:
    best: dict[str, float | None] = {}
    for name in rounds[0]:
        rates = [rate for each in rounds if (rate := each[name]) is not None]
        best[name] = max(rates, default=None)
    return best
