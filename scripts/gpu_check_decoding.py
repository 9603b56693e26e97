"""The checks of decoding on a GPU that `gpu_check.py` runs: the very pixels of the CPU, always."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_check_extraction import random_weights
from gpu_check_photos import corruptions, photos_of_every_kind
from gpu_check_steps import Figures, Run
from numpy.typing import NDArray
from torch import Tensor

from cache.store import FeatureCache, open_cache
from pipeline.bench.jpegs import write_coco_like_photos
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.precision import fast_precisions
from pipeline.encoder.weights import load_backbone
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import extract
from pipeline.photos.decoding import ImageError
from pipeline.photos.preprocessing import preprocess
from pipeline.photos.views import VIEWS

# (N, V, 3, S, S) uint8 of the photos with pixels, and which those are; the others are the CPU's.
Decoded = tuple[NDArray[np.uint8], list[int]]
_CORRUPTIONS = 2000
_LARGEST_CORRUPTED = 20_000  # bytes
_BUSY_PHOTOS, _BUSY_DISTINCT, _BUSY_BATCH = 20_000, 398, 256


def both_decoders_give_the_same_cache(run: Run) -> Figures:
    """Extracts photos of every kind, damaged ones and COCO-like ones with the CPU's decoder and
    with the GPU's: the same photos set aside for the same reasons, and the same features to the
    bit.
    """
    if not _has_decoders():
        return {"skipped": "this version decodes on the CPU alone"}
    folder = run.work / "decoding"
    folder.mkdir()
    kinds = photos_of_every_kind(run.small)
    whole = [data for files in kinds.values() for data in files]
    base = [data for data in whole if len(data) <= _LARGEST_CORRUPTED]
    damaged = corruptions(base, 24 if run.small else _CORRUPTIONS)
    for number, data in enumerate(whole + damaged):
        (folder / f"kinds-{number:05d}.jpg").write_bytes(data)
    if not run.small:
        (folder / "coco").mkdir()
        write_coco_like_photos(folder / "coco", 1024)
    gpu = "cpu" if run.device == "cpu" else "gpu"
    weights = random_weights(run.backbone, folder.parent)
    caches = [
        _extracted(run, folder, weights, "cpu", run.work / "by-the-cpu.h5"),
        _extracted(run, folder, weights, gpu, run.work / "by-the-gpu.h5"),
    ]
    differences = differing_rows(*caches)
    figures: Figures = {
        "decoders": f"cpu, {gpu}",
        "photos": len(caches[0]),
        "set_aside": len(caches[0].errors()),
        "differing": len(differences),
        "first": differences[:10],
    }
    assert not differences, figures
    return figures


def differing_rows(first: FeatureCache, second: FeatureCache) -> list[str]:
    """What differs in each row of two caches of the same photos, one line per row."""
    if list(first.paths) != list(second.paths):
        return ["the paths"]
    reasons = dict(first.errors()), dict(second.errors())
    lines = []
    for row, path in enumerate(first.paths):
        found = []
        for name in ("status", "digests"):
            one, other = (getattr(cache, name)[row] for cache in (first, second))
            if not np.array_equal(one, other):
                found.append(f"{name} {one} and {other}")
        if reasons[0].get(path) != reasons[1].get(path):
            found.append(f"{reasons[0].get(path)!r} and {reasons[1].get(path)!r}")
        bits = [cache.features[row].view(np.uint16) for cache in (first, second)]
        if not np.array_equal(*bits):
            found.append("features")
        if found:
            lines.append(f"{path}: {', '.join(found)}")
    return lines


def gpu_pixels_are_the_cpus(run: Run) -> Figures:
    """Compares what the GPU's decoder makes of every kind with `preprocess`, for every view."""
    kinds = photos_of_every_kind(run.small)
    base = [data for files in kinds.values() for data in files if len(data) <= _LARGEST_CORRUPTED]
    kinds["damaged"] = corruptions(base, 24 if run.small else _CORRUPTIONS)
    figures: Figures = {}
    for size, views in ((224, ("full",)), (64, VIEWS)):
        decoder, reason = gpu_decoder(run.device, size, views)
        if decoder is None:
            return {"skipped": reason}
        for kind, files in kinds.items():
            found = compare(files, size, views, functools.partial(_on_gpu, decoder))
            figures[f"{kind}, {size}, {len(views)} views"] = found
        decoder.close()
    wrong = {name: found for name, found in figures.items() if found["wrong"]}
    assert not wrong, wrong
    return figures


def compare(
    files: Sequence[bytes],
    size: int,
    views: tuple[str, ...],
    decode: Callable[[Sequence[bytes]], Decoded],
) -> Figures:
    """How many of these files a decoder takes, and how many it decodes otherwise than the CPU."""
    pixels, taken = decode(files)
    wrong, levels, accepted = [], 0, 0
    for found, number in zip(pixels, taken, strict=True):
        try:
            expected = preprocess(files[number], size, views).numpy()
        except ImageError:
            accepted += 1
            wrong.append(number)
            continue
        difference = int(np.abs(found.astype(np.int16) - expected).max())
        levels = max(levels, difference)
        if difference:
            wrong.append(number)
    return {
        "photos": len(files),
        "taken": len(taken),
        "wrong": len(wrong),
        "levels": levels,  # the largest difference
        "accepted": accepted,  # of the wrong ones: those that the CPU sets aside
        "first": wrong[:5],
    }


def no_wrong_pixel_beside_the_backbone(run: Run) -> Figures:
    """Decodes 20,000 photos while the backbone computes, and compares each with the CPU's pixels,
    on the GPU.
    """
    decoder, reason = gpu_decoder(run.device, 224, ("full",))
    if decoder is None:
        return {"skipped": reason}
    from pipeline.photos.gpu.decoder import JpegFile  # type: ignore[import-not-found,unused-ignore]

    device = torch.device(run.device)
    folder = run.work / "beside"
    folder.mkdir()
    write_coco_like_photos(folder, _BUSY_DISTINCT)
    files = _takeable(path.read_bytes() for path in sorted(folder.iterdir()))
    expected = torch.cat([preprocess(data, 224) for data, _ in files]).to(device)
    encoder = Encoder(
        load_backbone(run.backbone, "random"),
        device=device,
        precision=fast_precisions(device)[0],
    )
    photos = expected[torch.arange(_BUSY_BATCH) % len(expected)]
    features = encoder.encode(photos).clone()
    out = _empty(_BUSY_BATCH, decoder)
    order = np.random.default_rng(3).integers(0, len(files), _BUSY_PHOTOS)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    refused = 0
    for start in range(0, _BUSY_PHOTOS, _BUSY_BATCH):
        chosen = order[start : start + _BUSY_BATCH].tolist()
        for _ in range(2):  # busy until the batch is decoded
            encoder.encode(photos)
        out.zero_()
        decoder.stream.wait_stream(torch.cuda.current_stream(device))
        batch = [JpegFile(place, *_bytes_of(files[number])) for place, number in enumerate(chosen)]
        refused += len(decoder.decode(batch, out))
        torch.cuda.current_stream(device).wait_stream(decoder.stream)
        same = expected[torch.tensor(chosen, device=device)]
        wrong += (out[: len(chosen), 0] != same).flatten(1).any(1).sum()
    again = encoder.encode(photos)
    decoder.close()
    figures = {
        "photos": _BUSY_PHOTOS,
        "distinct": len(files),
        "refused": refused,
        "wrong": int(wrong),
        "features_changed": int((again != features).sum()),
    }
    assert figures["wrong"] == refused == figures["features_changed"] == 0, figures
    return figures


def gpu_decoder(device: str, size: int, views: tuple[str, ...]) -> tuple[Any, str]:
    """The GPU's decoder; or None, and why there is none.

    Where NVIDIA's decoder is installed, the hardware may be missing, but nothing else may go wrong.
    """
    if device == "cpu":
        return None, "the device is cpu"
    try:
        from pipeline.photos.gpu.decoder import (  # type: ignore[import-not-found,unused-ignore]
            GpuDecoder,
        )
        from pipeline.photos.gpu.nvjpeg import (  # type: ignore[import-not-found,unused-ignore]
            NvjpegError,
        )
    except ImportError as error:
        return None, str(error)
    try:
        return GpuDecoder(torch.device(device), size, views), ""
    except NvjpegError as error:
        return None, str(error)


def _on_gpu(decoder: Any, files: Sequence[bytes]) -> Decoded:
    from pipeline.photos.gpu.decoder import JpegFile  # type: ignore[import-not-found,unused-ignore]

    sizes = [_gpu_size(data) for data in files]
    numbers = [number for number, size in enumerate(sizes) if size is not None]
    taken: list[int] = []
    parts = [np.zeros((0, len(decoder.views), 3, *(decoder.image_size,) * 2), np.uint8)]
    for start in range(0, len(numbers), 64):
        chosen = numbers[start : start + 64]
        out = _empty(len(chosen), decoder)
        decoder.stream.wait_stream(torch.cuda.current_stream(out.device))
        batch = [
            JpegFile(place, *_bytes_of((files[number], sizes[number])))
            for place, number in enumerate(chosen)
        ]
        refused = set(decoder.decode(batch, out))
        decoder.stream.synchronize()
        kept = [place for place in range(len(chosen)) if place not in refused]
        taken += [chosen[place] for place in kept]
        parts.append(out.cpu().numpy()[kept])
    return np.concatenate(parts), taken


def _takeable(files: Iterable[bytes]) -> list[tuple[bytes, tuple[int, int]]]:
    return [(data, size) for data in files if (size := _gpu_size(data)) is not None]


def _gpu_size(data: bytes) -> tuple[int, int] | None:
    from pipeline.photos.jpeg_header import (  # type: ignore[import-not-found,unused-ignore]
        gpu_size,
        read_header,
    )

    size: tuple[int, int] | None = gpu_size(read_header(data))
    return size


def _bytes_of(file: tuple[bytes, tuple[int, int] | None]) -> tuple[int, int, int, int]:
    """(address, length, height, width) of a file, which must stay in memory."""
    data, size = file
    assert size is not None
    return np.frombuffer(data, np.uint8).ctypes.data, len(data), *size


def _empty(count: int, decoder: Any) -> Tensor:
    """(count, V, 3, S, S) uint8 zeros on the device, channels last in memory."""
    shape = (count, len(decoder.views), decoder.image_size, decoder.image_size, 3)
    return torch.zeros(shape, dtype=torch.uint8, device=decoder.device).permute(0, 1, 4, 2, 3)


def _has_decoders() -> bool:
    return any(field.name == "decoder" for field in dataclasses.fields(ExtractConfig))


def _extracted(run: Run, folder: Path, weights: Path, decoder: str, out: Path) -> FeatureCache:
    options: dict[str, Any] = {"decoder": decoder}
    if run.small:
        options |= {"image_size": 32, "precision": "float32"}
    config = ExtractConfig(
        images=folder,
        out=out,
        backbone=run.backbone,
        weights=str(weights),
        device=run.device,
        **options,
    )
    for _ in extract(config):
        pass
    return open_cache(out)


STEPS: dict[str, Callable[[Run], Figures]] = {
    step.__name__: step
    for step in (
        gpu_pixels_are_the_cpus,
        no_wrong_pixel_beside_the_backbone,
        both_decoders_give_the_same_cache,
    )
}
