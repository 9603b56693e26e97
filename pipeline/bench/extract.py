"""`cap bench extract`: each part of an extraction alone, and the whole extraction, in one run."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cache.record import EncoderRecord
from cache.store import open_cache
from pipeline.bench.jpegs import write_bench_photos
from pipeline.bench.machine import peak_rss_mb
from pipeline.encoder.encoder import Encoder, normalizer
from pipeline.encoder.weights import load_backbone
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import extract
from pipeline.extraction.fill import Notice
from pipeline.photos.photo_loader import BatchRequest, PhotoLoader
from pipeline.photos.preprocessing import preprocess
from pipeline.photos.readers.start import reader_count
from train.allocator import keep_freed_memory
from train.device import resolve_device

_DEFAULT_PHOTOS = {"cpu": 192, "cuda": 16_384}
_PLAIN_BATCH = 32
_PART_S = 3.0  # how long each part is measured in each round


@dataclass(frozen=True)
class ExtractBench:
    """Photos per second of each part and of the whole, each the best of several rounds."""

    backbone: str
    precision: str  # of the fast backbone, as chosen by the whole extraction
    device: str
    photos: int
    width: int
    height: int
    photo_kb: float  # mean size of a JPEG, 10^3 bytes
    batch_rows: int
    threads: int  # for decoding
    decode_per_s: float  # reading, digesting, decoding and resizing, on all cores
    plain_loop_per_s: float  # decoding by Pillow, then encoding in eager float32, in turns
    plain_backbone_per_s: float  # eager float32, with pixels that are on the device already
    backbone_per_s: float  # fused, in `precision`, with pixels that are on the device already
    end_to_end_per_s: float  # `extract`: files to a cache, from the first photo on
    start_s: float  # until the first photo: listing photos, making weights, choosing the precision
    first_batch_s: float  # from the start until the first batch is written
    peak_rss_mb: float  # of the process after the first whole extraction
    peak_gpu_mb: float | None  # likewise, held by torch on the GPU

    @property
    def backbone_ratio(self) -> float:
        return self.backbone_per_s / self.plain_backbone_per_s

    @property
    def end_to_end_ratio(self) -> float:
        return self.end_to_end_per_s / self.plain_loop_per_s

    @property
    def slowest_part(self) -> str:
        return "decode" if self.decode_per_s < self.backbone_per_s else "backbone"

    @property
    def slowest_share(self) -> float:
        """The speed of the whole extraction as a share of its slowest part's."""
        return self.end_to_end_per_s / min(self.decode_per_s, self.backbone_per_s)

    def as_dict(self) -> dict[str, object]:
        ratios = ("backbone_ratio", "end_to_end_ratio", "slowest_part", "slowest_share")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in ratios}

    def table(self) -> str:
        gpu = "" if self.peak_gpu_mb is None else f", {self.peak_gpu_mb:,.0f} MB on the GPU"
        return "\n".join(
            (
                f"{self.photos:,} JPEGs of {self.width}×{self.height}, {self.photo_kb:.0f} kB each;"
                f" {self.backbone} in {self.precision}, batches of {self.batch_rows}",
                f"plain loop              {self.plain_loop_per_s:>10,.1f} photos/s",
                f"plain backbone alone    {self.plain_backbone_per_s:>10,.1f} photos/s",
                f"fast backbone alone     {self.backbone_per_s:>10,.1f} photos/s"
                f"  {self.backbone_ratio:.1f} times the plain one",
                f"decode alone            {self.decode_per_s:>10,.1f} photos/s"
                f"  with {self.threads} threads",
                f"end to end              {self.end_to_end_per_s:>10,.1f} photos/s"
                f"  {self.end_to_end_ratio:.1f} times the plain loop,"
                f" {self.slowest_share:.0%} of the {self.slowest_part} alone",
                f"start                   {self.start_s:>10,.1f} s"
                f"         first batch written after {self.first_batch_s:.1f} s",
                f"peak memory             {self.peak_rss_mb:>10,.0f} MB{gpu}",
            )
        )


def bench_extract(
    backbone: str = "resnet152",
    photos: int | None = None,
    *,
    size: tuple[int, int] = (640, 480),
    device: str = "auto",
    rounds: int = 3,
) -> ExtractBench:
    """Measure on JPEGs made in a temporary folder, with random weights.

    photos: of the whole extraction; None for enough to take some seconds. size: (width, height) of
    a photo. The files are read from the page cache.
    """
    chosen = resolve_device(device)
    count = photos or _DEFAULT_PHOTOS[chosen.type]
    with tempfile.TemporaryDirectory(prefix="cap-bench-") as name:
        folder = Path(name) / "photos"
        folder.mkdir()
        mean_bytes = write_bench_photos(folder, count, *size)
        config = ExtractConfig(
            images=folder,
            out=Path(name) / "cache.h5",
            backbone=backbone,
            weights="random",
            device=str(chosen),
            overwrite=True,
        )
        whole = [_end_to_end(config)]  # before the parts, so that the peak of memory is its own
        peak = peak_rss_mb()
        peak_gpu = torch.cuda.max_memory_reserved() / 1e6 if chosen.type == "cuda" else None
        cache = open_cache(config.out)
        parts = _Parts(sorted(folder.iterdir()), cache.encoder, cache.batch_rows, chosen)
        rates: list[list[float]] = []
        for number in range(rounds):
            if number:
                whole.append(_end_to_end(config))
            rates.append([_rate(part, chosen, _PART_S) for part in parts.all()])
        decode, plain_loop, plain_backbone, fast_backbone = (
            max(r) for r in zip(*rates, strict=True)
        )
        return ExtractBench(
            backbone=backbone,
            precision=cache.encoder.precision,
            device=str(chosen),
            photos=count,
            width=size[0],
            height=size[1],
            photo_kb=mean_bytes / 1e3,
            batch_rows=cache.batch_rows,
            threads=reader_count(None),
            decode_per_s=decode,
            plain_loop_per_s=plain_loop,
            plain_backbone_per_s=plain_backbone,
            backbone_per_s=fast_backbone,
            end_to_end_per_s=max(run.photos_per_s for run in whole),
            start_s=min(run.start_s for run in whole),
            first_batch_s=min(run.first_batch_s for run in whole),
            peak_rss_mb=peak,
            peak_gpu_mb=peak_gpu,
        )


@dataclass(frozen=True)
class _EndToEnd:
    """One whole extraction."""

    photos_per_s: float
    start_s: float
    first_batch_s: float


def _end_to_end(config: ExtractConfig) -> _EndToEnd:
    begun = time.perf_counter()
    start_s = first_batch_s = 0.0
    photos_per_s = 0.0
    for report in extract(config):
        if isinstance(report, Notice):
            continue
        photos_per_s = report.photos_per_s
        if not report.new:
            start_s = time.perf_counter() - begun
        elif not first_batch_s:
            first_batch_s = time.perf_counter() - begun
    return _EndToEnd(photos_per_s, start_s, first_batch_s)


class _Parts:
    """The parts of an extraction, each to be run alone. A call returns its number of photos."""

    def __init__(
        self, paths: Sequence[Path], record: EncoderRecord, batch_rows: int, device: torch.device
    ) -> None:
        self._paths, self._batch_rows, self._device = paths, batch_rows, device
        backbone = load_backbone(record.backbone, record.weights)
        self._encoder = Encoder(backbone, device=device, precision=record.precision)
        self._plain = backbone.network.to(device)
        self._normalize = normalizer(device, torch.float32)
        self._size = record.image_size
        photos = [preprocess(path.read_bytes(), self._size) for path in paths[:batch_rows]]
        self._pixels = torch.cat(photos).to(device, memory_format=torch.channels_last)
        self.plain_backbone()
        for _ in range(3):  # a GPU captures its graph at the second call
            self.fast_backbone()

    def all(self) -> tuple[Callable[[], int], ...]:
        return self.decode, self.plain_loop, self.plain_backbone, self.fast_backbone

    def decode(self) -> int:
        """Load photos as an extraction does, without encoding them."""
        rows = range(len(self._paths))
        batches = [rows[i : i + self._batch_rows] for i in rows[:: self._batch_rows]]
        with PhotoLoader(
            [BatchRequest(batch[0], batch) for batch in batches],
            lambda row: str(self._paths[row]),
            batch_rows=self._batch_rows,
            image_size=self._size,
            views=("full",),
            readers=reader_count(None),
            pin_memory=self._device.type == "cuda",
        ) as loader:
            for batch in loader:
                loader.release(batch)
        return len(rows)

    @torch.no_grad()
    def plain_loop(self) -> int:
        """Decode a batch, then encode it, as in the tutorials and with torch's defaults."""
        photos = []
        keep_freed_memory(False)  # torch's default
        for path in self._paths[:_PLAIN_BATCH]:
            with Image.open(path) as image:
                small = image.convert("RGB").resize((self._size,) * 2, Image.Resampling.BILINEAR)
            photos.append(torch.from_numpy(np.array(small)).permute(2, 0, 1))
        images = self._normalize(torch.stack(photos).to(self._device)).contiguous()
        self._plain(images).cpu()
        return len(photos)

    @torch.no_grad()
    def plain_backbone(self) -> int:
        keep_freed_memory(False)
        self._plain(self._normalize(self._pixels[:_PLAIN_BATCH]).contiguous())
        return min(_PLAIN_BATCH, len(self._pixels))

    def fast_backbone(self) -> int:
        keep_freed_memory()
        self._encoder.encode(self._pixels)
        return len(self._pixels)


def _rate(part: Callable[[], int], device: torch.device, at_least_s: float) -> float:
    """Photos per second over as many calls as take `at_least_s` seconds."""
    photos, started = 0, time.perf_counter()
    while not photos or time.perf_counter() - started < at_least_s:
        photos += part()
        if device.type == "cuda":  # else only queueing the work is measured
            torch.cuda.synchronize(device)
    return photos / (time.perf_counter() - started)
