"""Run the checks that need a GPU, then the benchmarks, and write the results to one JSON file.

A check is a function that returns figures and raises AssertionError if something is wrong. The
checks and benchmarks of training are in `gpu_check_training.py`. The checks of extraction are in
`gpu_check_extraction.py`, which imports the packages that decode photos. The other benchmarks are
arguments of `cap bench`, in BENCHES.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check_training import (
    FULL,
    SMALL,
    TRAINING_BENCHES,
    TRAINING_CHECKS,
    TrainingSetting,
    measure_prompt_to_model,
    measure_training,
)

from pipeline.bench.machine import describe_machine
from pipeline.bench.synthetic_cache import PHOTOS, write_synthetic_cache

LIMIT_S = 460.0  # no benchmark starts later than this
_HUNG_S = 570.0  # a run that takes longer prints where it is, and ends
Figures = dict[str, Any]


# The first word is the command. Commands that this version lacks are left out.
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
    except Exception as error:  # the other checks are still worth running
        result = {
            "ok": False,
            "error": f"{type(error).__name__}: {error}",
            "where": traceback.format_exc(limit=-5)[-2000:],
        }
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def run_bench(arguments: str, left_s: float) -> Figures:
    command = [sys.executable, "-P", "-c", "from pipeline.cli.app import app; app()", "bench"]
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
    device: torch.device,
    work: Path,
    photos: int,
    left_s: Callable[[], float],
    record: Callable[[str, str, Figures], None],
) -> None:
    """Run the benchmarks of training on a cache of COCO's size."""
    cache = work / "train.h5"
    write_synthetic_cache(cache, photos)
    measures: dict[str, Callable[[Path, torch.device, Path], Figures]] = {
        name: partial(measure_training, recipe) for name, recipe in TRAINING_BENCHES.items()
    }
    measures["train, two classic epochs from the prompt"] = measure_prompt_to_model
    for name, measure in measures.items():
        if left_s() <= 0:
            record("benches", name, {"error": "no time left"})
        else:
            record("benches", name, run_check(partial(measure, cache, device, work)))


def bench_commands() -> set[str]:
    from pipeline.cli.bench import bench

    return {command.name or "" for command in bench.registered_commands}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--checks-only", action="store_true")
    parser.add_argument("--only", choices=("train", "extract"), help="run one half")
    parser.add_argument("--photos", type=int, default=PHOTOS, help="for the training benchmarks")
    parser.add_argument("--device", default="cuda", help="cpu: only to try this script")
    parser.add_argument("--backbone", default="resnet152")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was checked or measured", file=sys.stderr)
        return 1
    started = time.perf_counter()

    def left_s() -> float:
        return LIMIT_S - (time.perf_counter() - started)

    # With a number, as PyTorch names the device of a tensor.
    device = torch.empty(0, device=options.device).device
    if device.type == "cuda":
        faulthandler.dump_traceback_later(_HUNG_S, exit=True)
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
            sizes = SMALL if device.type == "cpu" else FULL
            training_setting = TrainingSetting(device, work, sizes)
            for training_check in TRAINING_CHECKS:
                figures = run_check(partial(training_check, training_setting))
                record("checks", training_check.__name__, figures)
        if options.only != "train":
            # Imported only here, because training works without the packages that decode photos.
            import gpu_check_extraction as extraction

            photos, batch_size = (32, 8) if device.type == "cpu" else (160, 32)
            setting = extraction.make_setting(work, device, options.backbone, photos, batch_size)
            for check in extraction.CHECKS:
                record("checks", check.__name__, run_check(partial(check, setting)))
        if options.only != "extract" and not options.checks_only:
            measure_all_training(device, work, options.photos, left_s, record)
    known = bench_commands()
    for arguments in () if options.checks_only or options.only == "train" else BENCHES:
        if arguments.split()[0] in known:
            record("benches", arguments, run_bench(arguments, left_s()))
    faulthandler.cancel_dump_traceback_later()
    print(options.out.resolve())
    done = results["checks"] | results["benches"]
    failed = [name for name, figures in done.items() if figures.get("ok") is False]
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
