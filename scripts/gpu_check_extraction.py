"""The checks of extraction that `gpu_check.py` runs, and the test suite's own GPU tests."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gpu_check_steps import Figures, Run

from cache.store import FeatureCache
from pipeline.bench.jpegs import write_bench_photos
from pipeline.encoder.backbone import Backbone
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.precision import MEAN_COSINE, MIN_COSINE, encode_plain, fast_precisions
from pipeline.encoder.weights import load_backbone
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import extract
from pipeline.extraction.fill import Progress
from pipeline.photos.preprocessing import preprocess


@dataclass(frozen=True)
class Setting:
    """What the checks work on."""

    device: torch.device
    backbone: Backbone  # random weights
    batch_size: int
    folder: Path  # of JPEGs
    pixels: torch.Tensor  # (N, 3, S, S) uint8, of these JPEGs
    work: Path  # for files

    @property
    def image_size(self) -> int:
        return self.pixels.shape[-1]


def fast_features_agree_with_float32(setting: Setting) -> Figures:
    """Compares every precision that `auto` may choose with the plain network on the same device."""
    photos = setting.pixels[: setting.batch_size]
    plain = encode_plain(setting.backbone, photos, setting.device)
    figures: Figures = {}
    for precision in fast_precisions(setting.device):
        encoder = Encoder(
            setting.backbone,
            device=setting.device,
            precision=precision,
            image_size=setting.image_size,
        )
        cosines = torch.cosine_similarity(encoder.encode(photos).float(), plain)
        figures[precision] = {"worst": float(cosines.min()), "mean": float(cosines.mean())}
        assert cosines.min() >= MIN_COSINE, figures
        assert cosines.mean() >= MEAN_COSINE, figures
    return figures


def devices_agree(setting: Setting) -> Figures:
    """Compares the plain network on this device with the plain network on the CPU."""
    photos = setting.pixels[:4]
    on_device = encode_plain(setting.backbone, photos, setting.device).cpu()
    on_cpu = encode_plain(setting.backbone, photos, torch.device("cpu"))
    worst = float(torch.cosine_similarity(on_device, on_cpu).min())
    assert worst > 0.99999, worst
    return {"worst": worst}


def graphs_compute_what_direct_calls_do(setting: Setting) -> Figures:
    """Compares a graph, replayed on other photos, with encoders that never captured one."""
    precision = fast_precisions(setting.device)[0]
    batches = setting.pixels.split(setting.batch_size)
    direct = []
    for batch in batches:
        encoder = Encoder(
            setting.backbone,
            device=setting.device,
            precision=precision,
            image_size=setting.image_size,
        )
        direct.append(encoder.encode(batch).cpu())
    queued = [encoder.queue(batch) for batch in batches]  # the second call captures
    for features, expected in zip(queued, direct, strict=True):
        assert torch.equal(torch.from_numpy(features.wait()), expected)
    assert encoder.notices == [], encoder.notices
    return {"batches": len(batches), "precision": precision}


def resumed_extraction_has_the_same_bytes(setting: Setting) -> Figures:
    """Compares an extraction that was interrupted and resumed twice with an unbroken one."""
    photos, batch_size = len(setting.pixels), setting.batch_size

    def config(name: str) -> ExtractConfig:
        return ExtractConfig(
            images=setting.folder,
            out=setting.work / name,
            backbone=setting.backbone.name,
            weights=setting.backbone.weights,
            device=str(setting.device),
            batch_size=batch_size,
            image_size=setting.image_size,
        )

    for _ in extract(config("whole.h5")):
        pass
    for _ in range(2):
        reports = extract(config("broken.h5"))
        for report in reports:
            if isinstance(report, Progress) and report.new >= batch_size:
                break
        reports.close()
    last: object = None
    for last in extract(config("broken.h5")):  # noqa: B007
        pass
    assert isinstance(last, Progress)
    assert 0 < last.new < photos, last
    same = (setting.work / "broken.h5").read_bytes() == (setting.work / "whole.h5").read_bytes()
    assert same, "the bytes differ from an unbroken run's"
    return {"photos": photos, "after_the_last_break": last.new}


def gpu_tests_pass(setting: Setting) -> Figures:
    """Runs the test suite's own GPU tests."""
    if setting.device.type == "cpu":
        return {"skipped": "the device is cpu"}
    if importlib.util.find_spec("pytest") is None:
        return {"skipped": "no pytest"}
    # The other files may import packages that this machine lacks.
    tests = Path(__file__).parent.parent / "tests"
    files = [path for path in sorted(tests.rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    assert files, "no file has GPU tests"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += map(str, files)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 0, "\n".join(lines[-15:])
    return {"summary": lines[-1]}


CHECKS: tuple[Callable[[Setting], Figures], ...] = (
    devices_agree,
    fast_features_agree_with_float32,
    graphs_compute_what_direct_calls_do,
    resumed_extraction_has_the_same_bytes,
    gpu_tests_pass,
)


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


def random_weights(backbone: str, folder: Path) -> Path:
    """A file of random weights: reading it is much faster than drawing and scaling them."""
    path = folder / "weights.pth"
    torch.save(load_backbone(backbone, "random").network.state_dict(), path)
    return path


@functools.cache
def _setting(run: Run) -> Setting:
    photos, batch_size, size = (24, 8, 64) if run.small else (160, 32, 224)
    folder = Path(tempfile.mkdtemp(dir=run.work))
    (folder / "photos").mkdir()
    write_bench_photos(folder / "photos", photos, 320, 240)
    paths = sorted((folder / "photos").iterdir())
    pixels = torch.cat([preprocess(path.read_bytes(), size) for path in paths])
    network = load_backbone(run.backbone, str(random_weights(run.backbone, folder)))
    device = torch.device(run.device)
    return Setting(device, network, batch_size, folder / "photos", pixels, folder)


def _step(check: Callable[[Setting], Figures]) -> Callable[[Run], Figures]:
    return lambda run: check(_setting(run))


STEPS = {check.__name__: _step(check) for check in CHECKS}
