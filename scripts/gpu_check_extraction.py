"""What `gpu_check.py` checks of extraction, and the test suite's own tests for a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.bench.jpegs import write_bench_photos
from pipeline.encoder.backbone import Backbone
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.precision import MEAN_COSINE, MIN_COSINE, encode_plain, fast_precisions
from pipeline.encoder.weights import load_backbone
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import Progress, extract
from pipeline.photos.preprocessing import preprocess

_PHOTOS = 160
_BATCH = 32
Figures = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What the checks work on."""

    device: torch.device
    backbone: Backbone  # random weights
    folder: Path  # of JPEGs
    pixels: torch.Tensor  # (_PHOTOS, 3, 224, 224) uint8, of the same
    work: Path  # for files


def fast_features_agree_with_float32(setting: Setting) -> Figures:
    """Every precision that `auto` may take, against the plain network on the same device."""
    photos = setting.pixels[:_BATCH]
    plain = encode_plain(setting.backbone, photos, setting.device)
    figures: Figures = {}
    for precision in fast_precisions(setting.device):
        encoder = Encoder(setting.backbone, device=setting.device, precision=precision)
        cosines = torch.cosine_similarity(encoder.encode(photos).float(), plain)
        figures[precision] = {"worst": float(cosines.min()), "mean": float(cosines.mean())}
        assert cosines.min() >= MIN_COSINE, figures
        assert cosines.mean() >= MEAN_COSINE, figures
    return figures


def devices_agree(setting: Setting) -> Figures:
    """The plain network here, against the plain network on the CPU."""
    photos = setting.pixels[:4]
    here = encode_plain(setting.backbone, photos, setting.device).cpu()
    there = encode_plain(setting.backbone, photos, torch.device("cpu"))
    worst = float(torch.cosine_similarity(here, there).min())
    assert worst > 0.99999, worst
    return {"worst": worst}


def graphs_compute_what_direct_calls_do(setting: Setting) -> Figures:
    """A captured graph, replayed on other photos, against encoders that never captured one."""
    precision = fast_precisions(setting.device)[0]
    batches = setting.pixels.split(_BATCH)
    direct = []
    for batch in batches:
        encoder = Encoder(setting.backbone, device=setting.device, precision=precision)
        direct.append(encoder.encode(batch).cpu())
    queued = [encoder.queue(batch) for batch in batches]  # the second call captures
    for features, expected in zip(queued, direct, strict=True):
        assert torch.equal(torch.from_numpy(features.wait()), expected)
    assert encoder.notices == [], encoder.notices
    return {"batches": len(batches), "precision": precision}


def resumed_extraction_has_the_same_bytes(setting: Setting) -> Figures:
    """Broken off twice and gone on with, against an unbroken run."""

    def config(name: str) -> ExtractConfig:
        return ExtractConfig(
            images=setting.folder,
            out=setting.work / name,
            backbone=setting.backbone.name,
            weights="random",
            device=str(setting.device),
            batch_size=_BATCH,
        )

    for _ in extract(config("whole.h5")):
        pass
    for _ in range(2):
        reports = extract(config("broken.h5"))
        for report in reports:
            if isinstance(report, Progress) and report.new >= _BATCH:
                break
        reports.close()
    last: object = None
    for last in extract(config("broken.h5")):  # noqa: B007
        pass
    assert isinstance(last, Progress)
    assert 0 < last.new < _PHOTOS, last
    same = (setting.work / "broken.h5").read_bytes() == (setting.work / "whole.h5").read_bytes()
    assert same, "other bytes than an unbroken run's"
    return {"photos": _PHOTOS, "after_the_last_break": last.new}


def gpu_tests_pass(setting: Setting) -> Figures:
    """The test suite's own tests for a GPU."""
    if importlib.util.find_spec("pytest") is None:
        return {"skipped": "no pytest"}
    # Other tests may need packages that a machine lent for an hour lacks.
    tests = Path(__file__).parent.parent / "tests"
    files = [path for path in sorted(tests.glob("test_*.py")) if "mark.gpu" in path.read_text()]
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


def make_setting(work: Path, device: torch.device, backbone: str) -> Setting:
    folder = work / "photos"
    folder.mkdir()
    write_bench_photos(folder, _PHOTOS, 320, 240)
    pixels = [preprocess(path.read_bytes(), 224) for path in sorted(folder.iterdir())]
    return Setting(device, load_backbone(backbone, "random"), folder, torch.cat(pixels), work)
