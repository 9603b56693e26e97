"""`cap bench predict`: the time to caption one photo, in a fresh process and with a loaded model,
and photos per second over a folder.

The benchmark makes a model of COCO's size with random weights. Its decoder has not learned to end a
caption, so with the loaded model the search ends every caption after the mean length of COCO's.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cache.errors import CapError
from pipeline.bench.captioning.cold_start import PARTS, caption_afresh
from pipeline.bench.machine import Machine, describe_machine
from pipeline.captioner.captioner import Captioner
from pipeline.encoder.backbone import Backbone
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.networks.sources import RANDOM
from pipeline.encoder.precision import choose_precision
from pipeline.encoder.weights import load_backbone
from pipeline.photos.photo_file import read_photo
from train.captions.vocabulary import SPECIALS, Vocabulary
from train.config import SearchConfig
from train.device import resolve_device
from train.model.bundle import Bundle
from train.model.decoder import CaptionDecoder, DecoderConfig

BEAM_SIZES = (1, 3)
_VOCAB_SIZE = 9_948  # COCO train2014 at minimum count 4
CAPTION_WORDS = 11  # the mean of COCO's captions, rounded
_PHOTO_SIZE = (640, 480)  # pixels; most of COCO
_WARM_PARTS = ("decode", "encode", "search")
_WARM_UP = 3  # photos captioned before the first measurement


@dataclass(frozen=True)
class Latency:
    """The results for one beam size: medians and 99th percentiles."""

    beam_size: int
    cold_p50_s: float  # one photo in a fresh process, from the prompt to the caption
    cold_p99_s: float
    warm_p50_ms: float  # one photo with a loaded model, from its path to its caption
    warm_p99_ms: float
    photos_per_s: float  # over a folder, with a loaded model
    cold_parts_s: dict[str, float]  # medians, in the order of `cold_start.PARTS`
    warm_parts_ms: dict[str, float]  # medians of _WARM_PARTS


@dataclass(frozen=True)
class PredictBench:
    """What was measured, with which model and on which machine."""

    backbone: str
    precision: str
    photos: int
    cold_runs: int
    latencies: tuple[Latency, ...]
    machine: Machine

    def table(self) -> str:
        lines = [
            f"{self.backbone} in {self.precision}, vocabulary {_VOCAB_SIZE:,}, "
            f"{self.photos} JPEGs of {_PHOTO_SIZE[0]}×{_PHOTO_SIZE[1]}, "
            f"{self.cold_runs} cold starts, files in memory",
            f"{'':<10}{'cold p50':>10}{'p99':>10}{'warm p50':>12}{'p99':>12}{'folder':>16}",
        ]
        lines += [
            f"{_named(row.beam_size):<10}{row.cold_p50_s:>8.2f} s{row.cold_p99_s:>8.2f} s"
            f"{row.warm_p50_ms:>9.1f} ms{row.warm_p99_ms:>9.1f} ms"
            f"{row.photos_per_s:>7.1f} photos/s"
            for row in self.latencies
        ]
        for head, unit, parts in (
            ("where a cold start goes", "s", [row.cold_parts_s for row in self.latencies]),
            ("where a warm photo goes", "ms", [row.warm_parts_ms for row in self.latencies]),
        ):
            lines += ["", f"{head:<30}" + "".join(f"{name:>14}" for name in parts[0])]
            for row, seconds in zip(self.latencies, parts, strict=True):
                digits = 2 if unit == "s" else 1
                cells = "".join(f"{f'{seconds[p]:.{digits}f} {unit}':>14}" for p in seconds)
                lines.append(f"{_named(row.beam_size):<30}{cells}")
        return "\n".join(lines)


def _named(beam_size: int) -> str:
    return "greedy" if beam_size == 1 else f"beam {beam_size}"


def bench_predict(
    *,
    backbone: str = "resnet152",
    weights: str = RANDOM,
    photos: int = 64,
    cold_runs: int = 5,
    device: str = "auto",
    progress: Callable[[int, int, float, str], None] = lambda *_: None,
) -> PredictBench:
    """Make a model and photos in a temporary folder and caption them.

    The beam sizes take turns, both in fresh processes and with the loaded model. progress: is told
    how many steps are done and how many there are, 0 for the rate, and what is being done. Raises
    EncoderError, DeviceError, or CapError if a fresh process fails.
    """
    chosen = resolve_device(device)
    starts = cold_runs * len(BEAM_SIZES)
    steps = starts + 2
    progress(0, steps, 0, "making a model")
    with tempfile.TemporaryDirectory(prefix="cap-bench-") as folder:
        names = write_bench_photos(Path(folder) / "photos", photos)
        model, precision = write_bench_model(Path(folder), backbone, weights, names, chosen)
        cold: dict[int, list[dict[str, float]]] = {beam_size: [] for beam_size in BEAM_SIZES}
        for run in range(cold_runs):
            for place, beam_size in enumerate(BEAM_SIZES, run * len(BEAM_SIZES) + 1):
                progress(place, steps, 0, f"cold start {place} of {starts}")
                photo = names[run % len(names)]
                cold[beam_size].append(caption_afresh(model, photo, beam_size, device))
        progress(starts + 1, steps, 0, "captioning with the loaded model")
        captioners = {
            beam_size: Captioner.load(
                model,
                device=device,
                search_config=SearchConfig(beam_size=beam_size, max_length=CAPTION_WORDS),
            )
            for beam_size in BEAM_SIZES
        }
        warm = _time_singly(captioners, names)
        parts = _time_parts(captioners, names)
        rates = {b: _folder_rate(captioner, names) for b, captioner in captioners.items()}
    progress(steps, steps, 0, "")
    totals = {beam_size: [sum(run.values()) for run in runs] for beam_size, runs in cold.items()}
    return PredictBench(
        backbone=backbone,
        precision=precision,
        photos=photos,
        cold_runs=cold_runs,
        latencies=tuple(
            Latency(
                beam_size=beam_size,
                cold_p50_s=statistics.median(totals[beam_size]),
                cold_p99_s=float(np.percentile(totals[beam_size], 99)),
                warm_p50_ms=1000 * statistics.median(warm[beam_size]),
                warm_p99_ms=1000 * float(np.percentile(warm[beam_size], 99)),
                photos_per_s=rates[beam_size],
                cold_parts_s=_medians(PARTS, cold[beam_size]),
                warm_parts_ms=_medians(_WARM_PARTS, parts[beam_size]),
            )
            for beam_size in BEAM_SIZES
        ),
        machine=describe_machine(chosen),
    )


def write_bench_photos(folder: Path, count: int) -> list[str]:
    """Write JPEGs of seeded noise with the coarse structure of photos; returns their paths."""
    folder.mkdir()
    random = np.random.default_rng(0)
    names = []
    for i in range(count):
        coarse = random.integers(0, 256, (48, 64, 3), np.uint8)
        image = Image.fromarray(coarse).resize(_PHOTO_SIZE, Image.Resampling.BICUBIC)
        image.save(folder / f"{i:04d}.jpg", quality=90)
        names.append(str(folder / f"{i:04d}.jpg"))
    return names


def write_bench_model(
    folder: Path, backbone: str, weights: str, photos: list[str], device: torch.device
) -> tuple[Path, str]:
    """Write a model with an untrained decoder.

    Returns (its file, the precision that `cap extract-features` would choose).
    """
    network = load_backbone(backbone, weights)
    if weights == RANDOM:
        # From a file, so that a start includes loading weights, as usual, and not drawing them.
        torch.save(network.network.state_dict(), folder / "weights.pth")
        network = load_backbone(backbone, str(folder / "weights.pth"))
    precision = _precision(network, photos[:8], device)
    encoder = Encoder(network, device=device, precision=precision)
    torch.manual_seed(0)
    decoder = CaptionDecoder(
        DecoderConfig(feature_dim=network.feature_dim, vocab_size=_VOCAB_SIZE)
    ).eval()
    count = _VOCAB_SIZE - len(SPECIALS)
    vocabulary = Vocabulary(tuple(f"word{i}" for i in range(count)), (4,) * count, min_count=4)
    Bundle(decoder, vocabulary, encoder.record, {}).save(folder / "model.cap")
    return folder / "model.cap", precision


def _precision(backbone: Backbone, photos: list[str], device: torch.device) -> str:
    pixels = [read_photo(Path(name), 224, ("full",)).pixels for name in photos]
    found, _ = choose_precision(
        backbone, torch.cat([p for p in pixels if p is not None]), device=device
    )
    return found


def _time_singly(captioners: dict[int, Captioner], names: list[str]) -> dict[int, list[float]]:
    """Seconds for each photo captioned alone, by beam size."""
    for captioner in captioners.values():
        for name in names[:_WARM_UP]:
            captioner.caption([name])
    taken: dict[int, list[float]] = {beam_size: [] for beam_size in captioners}
    for name in names:
        for beam_size, captioner in captioners.items():
            started = time.perf_counter()
            captioner.caption([name])
            taken[beam_size].append(time.perf_counter() - started)
    return taken


def _time_parts(
    captioners: dict[int, Captioner], names: list[str]
) -> dict[int, list[dict[str, float]]]:
    """Milliseconds of each of _WARM_PARTS for each photo, by beam size."""
    taken: dict[int, list[dict[str, float]]] = {beam_size: [] for beam_size in captioners}
    for name in names:
        for beam_size, captioner in captioners.items():
            started = time.perf_counter()
            pixels = captioner.decode(name).pixels
            decode_s = time.perf_counter() - started
            if pixels is None:
                raise CapError(f"{name}: cannot be read any more")
            timed = captioner.caption_decoded([name], pixels[None])
            seconds = (decode_s, timed.encode_s, timed.search_s)
            taken[beam_size].append(
                {part: 1000 * s for part, s in zip(_WARM_PARTS, seconds, strict=True)}
            )
    return taken


def _medians(names: Sequence[str], parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(part[name] for part in parts) for name in names}


def _folder_rate(captioner: Captioner, names: list[str]) -> float:
    captioner.caption(names)
    started = time.perf_counter()
    captioner.caption(names)
    return len(names) / (time.perf_counter() - started)
