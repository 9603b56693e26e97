"""Check that everything works on a GPU, then measure how fast it is; results in one JSON file.

There are two halves, of at most three minutes each. The steps of each half are in the modules named
in CHECKS and SPEEDS, with the seconds that each step may take. They run in child processes (see
`gpu_check_steps.py`), so that none that fails or hangs stops the others.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_check_steps import Figures, Run, run_steps

from pipeline.bench.machine import describe_machine
from pipeline.bench.synthetic_cache import PHOTOS

HALF_S = 165.0  # and some seconds to start and to end
# Where a CPU tries this script.
_SMALL_PHOTOS, _MORE_TIME = 24, 5
_TRAIN, _EXTRACT = "train", "extract"


@dataclass(frozen=True)
class Group:
    """Steps of one module, which run one after the other."""

    part: str  # train or extract, for --only
    module: str
    limits: dict[str, float]  # seconds of each step
    needs_gpu: bool = False


CHECKS = (
    Group(
        _TRAIN,
        "gpu_check_training",
        {
            "kernels_compile_and_pass_their_check": 40.0,
            "steps_compute_the_plain_loss_and_gradients": 90.0,
            "graphs_train_as_direct_steps_do": 60.0,
            "curves_lie_on_one_another": 60.0,
            "resumed_training_reaches_what_an_unbroken_run_does": 60.0,
        },
    ),
    Group(
        _TRAIN,
        "gpu_check_processes",
        {
            "sums_of_one_process_change_nothing": 40.0,
            "processes_reach_what_one_does": 90.0,
        },
    ),
    Group(
        _EXTRACT,
        "gpu_check_extraction",
        {
            "devices_agree": 60.0,
            "fast_features_agree_with_float32": 60.0,
            "graphs_compute_what_direct_calls_do": 60.0,
            "resumed_extraction_has_the_same_bytes": 90.0,
            "gpu_tests_pass": 120.0,
            "both_decoders_give_the_same_cache": 90.0,
        },
    ),
    Group(
        _EXTRACT,
        "gpu_check_decoding",
        {
            "gpu_pixels_are_the_cpus": 60.0,
            "no_wrong_pixel_beside_the_backbone": 60.0,
        },
        needs_gpu=True,
    ),
)
# The most telling first: the time may be over before the last.
SPEEDS = (
    Group(
        _EXTRACT,
        "gpu_check_speeds",
        {
            "photos are written": 45.0,
            "extract COCO": 75.0,
            "train classic on COCO": 40.0,
            "predict one photo": 40.0,
            "train on COCO": 80.0,
            "bench extract, COCO's mix": 60.0,
            "bench extract, 640x480": 60.0,
            "resident backbone": 60.0,
        },
    ),
    Group(
        _TRAIN,
        "gpu_check_training_speeds",
        {
            "train classic": 60.0,
            "train best": 60.0,
            "train classic, hidden 1024 x 2 layers": 60.0,
            "train classic, batch 512": 60.0,
            "train best, batch 512": 60.0,
        },
    ),
)
HALVES = {"checks": CHECKS, "speeds": SPEEDS}


def chosen(groups: Iterable[Group], only: Sequence[str], more_time: int = 1) -> list[Group]:
    """The groups with the steps that `--only` names, by their names or their part; all without.

    more_time: a factor of their limits.
    """
    kept = []
    for group in groups:
        wanted = {
            name: limit * more_time
            for name, limit in group.limits.items()
            if not only or name in only or group.part in only
        }
        if wanted:
            kept.append(replace(group, limits=wanted))
    return kept


def run_groups(
    groups: Sequence[Group],
    run: Run,
    record: Callable[[str, Figures], None],
    *,
    side_by_side: bool,
    limit_s: float,
) -> None:
    """Run the groups of one half, and record the figures of each step as it ends."""
    started, stopped = time.perf_counter(), threading.Event()

    def left_s() -> float:
        return 0.0 if stopped.is_set() else limit_s - (time.perf_counter() - started)

    def run_group(group: Group) -> None:
        if group.needs_gpu and run.small:
            for name in group.limits:
                record(name, {"ok": True, "skipped": "the device is cpu"})
            return
        for name, figures in run_steps(group.module, group.limits, run, left_s):
            record(name, figures)

    with ThreadPoolExecutor(len(groups) if side_by_side else 1) as threads:
        try:
            for done in as_completed([threads.submit(run_group, group) for group in groups]):
                done.result()
        except BaseException:  # Ctrl-C, too
            stopped.set()
            raise


def compile_for_children(work: Path) -> None:
    """Let children keep the modules that they compile, where that is switched off.

    Otherwise each of them would compile torch anew, and the start of every command would be timed
    with that.
    """
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None) is not None:
        os.environ.setdefault("PYTHONPYCACHEPREFIX", str(work / "compiled"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("half", nargs="?", choices=tuple(HALVES), help="one half; both without")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    names = [name for groups in HALVES.values() for g in groups for name in g.limits]
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        choices=(_TRAIN, _EXTRACT, *names),
        metavar="STEP",
        help="one step, or train or extract for the steps of one part; may be repeated",
    )
    parser.add_argument("--photos", type=int, help="of the largest extraction")
    parser.add_argument("--device", default="cuda", help="cpu: only to try this script")
    parser.add_argument("--backbone", default="resnet152")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was checked or measured", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the children like Ctrl-C
    started = time.perf_counter()
    # With a number, as PyTorch names the device of a tensor.
    device = torch.empty(0, device=options.device).device
    results: dict[str, Any] = {"machine": describe_machine(device).summary()}
    results |= {half: {} for half in HALVES}
    lock = threading.Lock()
    print(results["machine"], file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="cap-check-", ignore_cleanup_errors=True) as name:
        small = device.type == "cpu"
        photos = options.photos or (_SMALL_PHOTOS if small else PHOTOS)
        run = Run(str(device), Path(name), options.backbone, photos, small)
        compile_for_children(run.work)
        if small:
            os.environ["OMP_NUM_THREADS"] = "1"  # the small sizes gain nothing from more
        for half in HALVES if options.half is None else (options.half,):

            def record(name: str, figures: Figures, half: str = half) -> None:
                with lock:
                    results[half][name] = figures
                    results["seconds"] = round(time.perf_counter() - started, 1)
                    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                    verdict = "FAILED" if not figures["ok"] else "ok"
                    verdict = "skipped" if "skipped" in figures else verdict
                    print(f"{name}: {verdict} {json.dumps(figures)}", file=sys.stderr, flush=True)

            more_time = _MORE_TIME if small else 1
            groups = chosen(HALVES[half], options.only, more_time)
            if groups:
                # Checks measure no speed; beside others, more can go wrong with them.
                run_groups(
                    groups,
                    run,
                    record,
                    side_by_side=half == "checks",
                    limit_s=HALF_S * more_time,
                )
    print(options.out.resolve())
    done = results["checks"] | results["speeds"]
    failed = [name for name, figures in done.items() if not figures["ok"]]
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
