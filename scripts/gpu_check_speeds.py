"""The speeds of extraction, and of the way from photos to captions, that `gpu_check.py` measures.

What a user waits for is measured from the prompt, in fresh processes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gpu_check_extraction import random_weights
from gpu_check_steps import Figures, Run

from pipeline.bench.extract import bench_extract
from pipeline.bench.fresh_process import start_cap
from pipeline.bench.jpegs import MEAN_BYTES, write_bench_photos, write_coco_like_photos
from pipeline.bench.peak_memory import PeakMemory
from pipeline.bench.synthetic_cache import WORDS, write_synthetic_cache
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.precision import fast_precisions
from pipeline.encoder.weights import load_backbone

_BENCH_PHOTOS = 20_480
_PART_S = 1.0
_COLD_STARTS = 3
_RESIDENT_S = 1.5
_CAPTIONS = 5  # of a photo


def photos_are_written(run: Run) -> Figures:
    """Writes as many files as COCO train2014 has, with captions, and the backbone's weights.

    Meanwhile small commands are run, so that all modules are compiled when a start is timed.
    """
    with ThreadPoolExecutor() as threads:
        jobs = [threads.submit(job, run) for job in (_write_coco, _warm_extract, _warm_train)]
        for job in jobs:
            job.result()
    return _coco(run)


def extract_coco(run: Run) -> Figures:
    """`cap extract-features` of COCO's number of photos, from the prompt."""
    photos = _coco(run)["photos"]
    done = _cap(
        *("extract-features", "--images", run.work / "coco", "--out", run.work / "coco.h5"),
        *("--captions", run.work / "captions.csv", "--backbone", run.backbone),
        *("--weights", run.work / "weights.pth", "--device", run.device, "--overwrite", "--json"),
        device=run.device,
    )
    report = json.loads(done.out)
    assert (report["done"], report["unreadable"]) == (photos, 0), report
    figures = done.figures() | {
        "photos": photos,
        "photos_per_s": report["photos_per_s"],
        "start_s": done.seconds - report["seconds"],
    }
    return figures | _with_earlier(run, "extract", done.seconds)


def train_classic(run: Run) -> Figures:
    """`cap train --recipe classic`, two epochs, on that cache."""
    return _trained(run, "classic", "--recipe", "classic")


def train_as_it_comes(run: Run) -> Figures:
    """`cap train` without options, on that cache.

    The data decide how many epochs it takes, and these captions are made up: compare the time of an
    epoch as well.
    """
    return _trained(run, "default")


def predict_one_photo(run: Run) -> Figures:
    """`cap predict` of one photo, each time in a fresh process."""
    photo = run.work / "coco" / "00000000.jpg"
    model = run.work / "classic" / "best.cap"
    seconds = []
    for _ in range(1 if run.small else _COLD_STARTS):
        done = _cap("predict", photo, "--model", model, "--device", run.device, device=run.device)
        assert done.out.startswith(f"{photo}\t"), done.out
        seconds.append(done.seconds)
    return {"cold_s": seconds, "said": done.out.strip()}


def bench_coco_mix(run: Run) -> Figures:
    """`cap bench extract` on the files that are there."""
    return _bench(run, images=run.work / "coco")


def bench_640x480(run: Run) -> Figures:
    """`cap bench extract --size 640x480`."""
    return _bench(run, size=(96, 64) if run.small else (640, 480))


def resident_backbone(run: Run) -> Figures:
    """The backbone alone, on pixels that are on the device already, by the size of a batch."""
    device = torch.device(run.device)
    precision = fast_precisions(device)[0]
    backbone = load_backbone(run.backbone, "random")
    figures: Figures = {"precision": precision}
    for batch in (4,) if run.small else (256, 512, 1024):
        encoder = Encoder(backbone, device=device, precision=precision)
        pixels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, device=device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        for _ in range(3):  # a GPU captures its graph at the second call
            encoder.encode(pixels)
        _wait(device)
        calls, started = 0, time.perf_counter()
        while not calls or time.perf_counter() - started < (0 if run.small else _RESIDENT_S):
            for _ in range(1 if run.small else 8):
                encoder.encode(pixels)
                calls += 1
            _wait(device)
        figures[f"batch {batch}"] = calls * batch / (time.perf_counter() - started)
    return figures


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bench(run: Run, *, images: Path | None = None, size: tuple[int, int] | None = None) -> Figures:
    if images is not None:
        _coco(run)
    result = bench_extract(
        run.backbone,
        min(_BENCH_PHOTOS, run.photos),
        images=images,
        size=size,
        device=run.device,
        rounds=1,
        part_s=0.0 if run.small else _PART_S,
    )
    return result.as_dict()


def _trained(run: Run, name: str, *options: str) -> Figures:
    cache = run.work / "coco.h5"
    assert cache.exists(), f"{cache} is missing; extract_coco has to come first"
    out = run.work / name
    shutil.rmtree(out, ignore_errors=True)
    done = _cap(
        *("train", "--from-cache", cache, "--out", out, "--device", run.device, *options),
        device=run.device,
        marker="Step [",
    )
    assert (out / "best.cap").exists(), done.err[-1000:]
    figures = done.figures() | {
        "before_first_log_line_s": done.marked_s,
        "epochs": [line for line in done.err.splitlines() if "done in" in line],
        "said": done.out.strip()[-1000:],
    }
    return figures | _with_earlier(run, f"train {name}", done.seconds)


def _with_earlier(run: Run, name: str, seconds: float) -> Figures:
    """Notes how long this took. For training: the sum with the extraction before."""
    file = run.work / "seconds.json"
    noted = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(noted | {name: seconds}))
    return {"with_extraction_s": seconds + noted["extract"]} if name != "extract" else {}


@dataclass(frozen=True)
class _Done:
    """A command that has succeeded."""

    seconds: float
    marked_s: float | None  # until the first line of stderr with the marker
    out: str
    err: str
    host_mb: float  # at the peak, of all its processes
    gpu_mb: float | None

    def figures(self) -> Figures:
        return {
            "seconds_from_the_prompt": self.seconds,
            "peak_memory_mb": self.host_mb,
            "peak_gpu_mb": self.gpu_mb,
        }


def _cap(*arguments: object, device: str, marker: str = "") -> _Done:
    lines, marked_s = [], None
    with PeakMemory(torch.device(device)) as peak:
        started = time.perf_counter()
        with start_cap(*arguments) as process:
            peak.watch(process.pid)
            assert process.stdout is not None
            assert process.stderr is not None
            for line in process.stderr:
                lines.append(line)
                if marker and marked_s is None and marker in line:
                    marked_s = time.perf_counter() - started
            out = process.stdout.read()  # a few lines, for which the pipe has room
        seconds = time.perf_counter() - started
    err = "".join(lines)
    assert process.returncode == 0, err[-1000:]
    return _Done(seconds, marked_s, out, err, peak.host_mb, peak.gpu_mb)


def _coco(run: Run) -> Figures:
    """What `_write_coco` has written; it is called if it was not."""
    file = run.work / "coco.json"
    if not file.exists():
        _write_coco(run)
    written: Figures = json.loads(file.read_text())
    return written


def _write_coco(run: Run) -> None:
    folder = run.work / "coco"
    shutil.rmtree(folder, ignore_errors=True)  # half of them, by a step that was killed
    folder.mkdir()
    room = int(0.7 * shutil.disk_usage(folder).free / MEAN_BYTES)
    photos = min(run.photos, room)
    started = time.perf_counter()
    mean_bytes = write_coco_like_photos(folder, photos)
    seconds = time.perf_counter() - started
    random_weights(run.backbone, run.work)
    _write_captions(run.work / "captions.csv", photos)
    figures = {"photos": photos, "gigabytes": photos * mean_bytes / 1e9, "writing_s": seconds}
    (run.work / "coco.json").write_text(json.dumps(figures))


def _write_captions(path: Path, photos: int) -> None:
    """Five captions of 11 words per photo, with the frequencies of `write_synthetic_cache`."""
    random = np.random.default_rng(0)
    shares = 1 / np.arange(1, WORDS + 1)
    numbers = random.choice(WORDS, (photos * _CAPTIONS, 11), p=shares / shares.sum())
    words = np.array([f"word{number}" for number in range(WORDS)], object)[numbers]
    with path.open("w", encoding="utf-8") as file:
        file.write("image,caption\n")
        for row, caption in enumerate(words):
            file.write(f"{row // _CAPTIONS:08d}.jpg,{' '.join(caption).capitalize()}.\n")


def _warm_extract(run: Run) -> None:
    folder = run.work / "warm"
    folder.mkdir(exist_ok=True)
    write_bench_photos(folder, 8, 96, 64)
    _warm(
        *("extract-features", "--images", folder, "--out", run.work / "warm.h5", "--overwrite"),
        *("--backbone", run.backbone, "--weights", "random", "--device", run.device),
    )


def _warm_train(run: Run) -> None:
    write_synthetic_cache(run.work / "warm-train.h5", 100)
    shutil.rmtree(run.work / "warm-run", ignore_errors=True)
    _warm(
        *("train", "--from-cache", run.work / "warm-train.h5", "--out", run.work / "warm-run"),
        *("--recipe", "classic", "--epochs", 1, "--device", run.device),
    )


def _warm(*arguments: object) -> None:
    with start_cap(*arguments) as process:
        _, err = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, f"cap {arguments[0]}", stderr=err)


STEPS: dict[str, Callable[[Run], Figures]] = {
    "photos are written": photos_are_written,
    "extract COCO": extract_coco,
    "train classic on COCO": train_classic,
    "predict one photo": predict_one_photo,
    "train on COCO": train_as_it_comes,
    "bench extract, COCO's mix": bench_coco_mix,
    "bench extract, 640x480": bench_640x480,
    "resident backbone": resident_backbone,
}
