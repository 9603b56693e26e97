"""The checks of decoding on a GPU that `gpu_check.py` runs: the very pixels of the CPU, always."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_check_extraction import differing_rows, random_weights
from gpu_check_photos import corruptions, photos_of_every_kind
from gpu_check_steps import Figures, Run
from numpy.typing import NDArray
from torch import Tensor

from cache.store import FeatureCache, open_cache
from pipeline.bench.jpegs import write_coco_like_photos
from pipeline.encoder.backbone import Backbone
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


def gpu_pixels_are_the_cpus(run: Run) -> Figures:
    """Compares what the GPU's decoder makes of every kind with `preprocess`, for every view."""
    figures: Figures = {}
    for size, views in ((224, ("full",)), (64, VIEWS)):
        decoder, reason = gpu_decoder(run.device, size, views)
        if decoder is None:
            return {"skipped": reason}
        for kind, found in compare_kinds(decoder, _CORRUPTIONS).items():
            figures[f"{kind}, {size}, {len(views)} views"] = found
        decoder.close()
    wrong = {name: found for name, found in figures.items() if found["wrong"]}
    assert not wrong, wrong
    return figures


def compare_kinds(decoder: Any, damaged: int, small: bool = False) -> dict[str, Figures]:
    """`compare` of a GpuDecoder, for photos of every kind and so many damaged ones."""
    kinds = photos_of_every_kind(small)
    base = [data for files in kinds.values() for data in files if len(data) <= _LARGEST_CORRUPTED]
    kinds["damaged"] = corruptions(base, damaged)
    decode = functools.partial(_on_gpu, decoder)
    size, views = decoder.image_size, decoder.views
    return {kind: compare(files, size, views, decode) for kind, files in kinds.items()}


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
    backbone = load_backbone(run.backbone, "random")
    (run.work / "beside").mkdir()
    write_coco_like_photos(run.work / "beside", _BUSY_DISTINCT)
    files = [path.read_bytes() for path in sorted((run.work / "beside").iterdir())]
    figures = decode_beside(decoder, backbone, files, _BUSY_PHOTOS, _BUSY_BATCH)
    decoder.close()
    assert figures["wrong"] == figures["refused"] == figures["features_changed"] == 0, figures
    return figures


def decode_beside(
    decoder: Any, backbone: Backbone, files: Sequence[bytes], count: int, batch_rows: int
) -> Figures:
    """Decode `count` photos, drawn from `files`, while the backbone is busy with others."""
    from pipeline.photos.gpu.decoder import JpegFile  # type: ignore[import-not-found,unused-ignore]

    device = decoder.device
    taken = [(data, size) for data in files if (size := _gpu_size(data)) is not None]
    expected = torch.cat([preprocess(data, decoder.image_size) for data, _ in taken]).to(device)
    encoder = Encoder(
        backbone,
        device=device,
        precision=fast_precisions(device)[0],
        image_size=decoder.image_size,
    )
    busy_with = expected[torch.arange(batch_rows) % len(expected)]
    for _ in range(2):  # a GPU captures its graph at the second call
        features = encoder.encode(busy_with).clone()
    out = _empty(batch_rows, decoder)
    order = np.random.default_rng(3).integers(0, len(taken), count)
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    refused = 0
    for start in range(0, count, batch_rows):
        chosen = order[start : start + batch_rows].tolist()
        out.zero_()
        _let_begin(decoder)
        for _ in range(2):  # busy until the batch is decoded
            encoder.encode(busy_with)
        batch = [JpegFile(place, *_bytes_of(taken[number])) for place, number in enumerate(chosen)]
        refused += len(decoder.decode(batch, out))
        _wait_for(decoder)
        same = expected[torch.tensor(chosen, device=device)]
        wrong += (out[: len(chosen), 0] != same).flatten(1).any(1).sum()
    again = encoder.encode(busy_with)
    return {
        "photos": count,
        "distinct": len(taken),
        "refused": refused,
        "wrong": int(wrong),
        "features_changed": int((again != features).sum()),
    }


def _let_begin(decoder: Any) -> None:
    """The decoder's stream begins when what is queued now is done; a CPU has no streams."""
    if decoder.stream is not None:
        decoder.stream.wait_stream(torch.cuda.current_stream(decoder.device))


def _wait_for(decoder: Any) -> None:
    """What is queued next begins when the decoder's pixels are there."""
    if decoder.stream is not None:
        torch.cuda.current_stream(decoder.device).wait_stream(decoder.stream)


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
        _let_begin(decoder)
        batch = [
            JpegFile(place, *_bytes_of((files[number], sizes[number])))
            for place, number in enumerate(chosen)
        ]
        refused = set(decoder.decode(batch, out))
        _wait_for(decoder)
        kept = [place for place in range(len(chosen)) if place not in refused]
        taken += [chosen[place] for place in kept]
        parts.append(out.cpu().numpy()[kept])
    return np.concatenate(parts), taken


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
