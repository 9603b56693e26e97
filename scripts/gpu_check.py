"""Check on a GPU what can be checked nowhere else, then run the benchmarks; one JSON file of both.

A check is a function from a `Setting` to figures that raises AssertionError where something is
wrong; add it to CHECKS. A benchmark is the arguments of a `cap bench` command; add it to BENCHES.
Training's own are in `gpu_check_training.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check_training import (
    TRAINING_BENCHES,
    TRAINING_CHECKS,
    measure_prompt_to_model,
    measure_training,
)

from pipeline.bench_photos import write_bench_photos
from pipeline.bench_train import PHOTOS, write_synthetic_cache
from pipeline.config import ExtractConfig
from pipeline.encoder import (
    MEAN_COSINE,
    MIN_COSINE,
    Backbone,
    Encoder,
    encode_plain,
    fast_precisions,
    load_backbone,
)
from pipeline.extract import Progress, extract
from pipeline.images import preprocess
from train.machine import describe_machine

LIMIT_S = 460.0  # of everything
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
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
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

# The first word is the command: one that this version lacks is left out.
BENCHES: tuple[str, ...] = (
    "extract --size 640x480 --rounds 2",
    "extract --size 256x256 --rounds 2",
    "extract --size 640x480 --photos 82783 --rounds 1",
    "extract --size 640x480 --backbone resnet50 --rounds 1",
    "predict",
)


def run_check(check: Callable[[], Figures]) -> Figures:
    started = time.perf_counter()
    try:
        result: Figures = {"ok": True, **check()}
    except Exception as error:  # whatever it is, the other checks are still worth running
        result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def run_bench(arguments: str, left_s: float) -> Figures:
    command = [sys.executable, "-c", "from pipeline.cli import app; app()", "bench"]
    try:
        done = subprocess.run(
            [*command, *arguments.split(), "--json"],
            capture_output=True,
            text=True,
            timeout=max(left_s, 1.0),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": "no time left"}
    if done.returncode:
        return {"error": done.stderr.strip()[-1000:]}
    figures: Figures = json.loads(done.stdout)
    return figures


def measure_all_training(
    device: torch.device, work: Path, photos: int, record: Callable[[str, str, Figures], None]
) -> None:
    """On one cache of COCO's size."""
    cache = work / "train.h5"
    write_synthetic_cache(cache, photos)
    for name, recipe in TRAINING_BENCHES.items():
        measured = run_check(partial(measure_training, recipe, cache, device))
        record("benches", name, measured)
        torch.cuda.empty_cache()
    measured = run_check(partial(measure_prompt_to_model, cache, device, work))
    record("benches", "train, two classic epochs from the prompt", measured)


def _setting(work: Path, device: torch.device, backbone: str) -> Setting:
    folder = work / "photos"
    folder.mkdir()
    write_bench_photos(folder, _PHOTOS, 320, 240)
    pixels = [preprocess(path.read_bytes(), 224) for path in sorted(folder.iterdir())]
    return Setting(device, load_backbone(backbone, "random"), folder, torch.cat(pixels), work)


def bench_commands() -> set[str]:
    from pipeline.cli_bench import bench

    return {command.name or "" for command in bench.registered_commands}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--only", choices=("train", "extract"), help="one half of everything")
    parser.add_argument("--photos", type=int, default=PHOTOS, help="of the training benchmarks")
    parser.add_argument("--device", default="cuda", help="cpu: only to try this script")
    parser.add_argument("--backbone", default="resnet152")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was checked or measured", file=sys.stderr)
        return 1
    started = time.perf_counter()
    # As PyTorch names the tensors' device: with a number.
    device = torch.empty(0, device=options.device).device
    results: dict[str, Any] = {
        "machine": describe_machine(device).summary(),
        "checks": {},
        "benches": {},
    }

    def record(kind: str, name: str, figures: Figures) -> None:
        results[kind][name] = figures
        results["seconds"] = round(time.perf_counter() - started, 1)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        verdict = {True: "ok", False: "FAILED"}.get(figures.get("ok", ""), "")
        print(f"{name}: {verdict} {json.dumps(figures)}", file=sys.stderr, flush=True)

    print(results["machine"], file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="cap-check-") as name:
        work = Path(name)
        if options.only != "extract":
            for training_check in TRAINING_CHECKS:
                figures = run_check(partial(training_check, device, work))
                record("checks", training_check.__name__, figures)
        if options.only != "train":
            setting = _setting(work, device, options.backbone)
            for check in CHECKS:
                record("checks", check.__name__, run_check(partial(check, setting)))
        if options.only != "extract" and not options.checks_only:
            measure_all_training(device, work, options.photos, record)
    known = bench_commands()
    for arguments in () if options.checks_only or options.only == "train" else BENCHES:
        if arguments.split()[0] in known:
            left_s = LIMIT_S - (time.perf_counter() - started)
            record("benches", arguments, run_bench(arguments, left_s))
    print(options.out.resolve())
    done = results["checks"] | results["benches"]
    failed = [name for name, figures in done.items() if figures.get("ok") is False]
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
