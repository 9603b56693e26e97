"""`scripts/gpu_check.sh` without a GPU says so, and its checks also run on a CPU."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from cache.record import CaptionTable, EncoderRecord, Skeleton, Strings
from cache.store import FeatureCache, open_cache
from cache.writer import open_writer
from pipeline.encoder.weights import load_backbone
from pipeline.photos.decoding import ImageError, decode
from pipeline.photos.preprocessing import preprocess
from tests.conftest import ROOT

# Steps of which one fails, one hangs with a process of its own, and one ends the child.
BROKEN = """
import os, subprocess, sys

def fails(run):
    raise AssertionError("other bytes")

def hangs(run):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (run.work / "child").write_text(str(child.pid))
    child.wait()

def ends(run):
    os._exit(3)

def works(run):
    print("this goes to the log")
    return {"figure": run.photos}

STEPS = {"fails": fails, "hangs": hangs, "ends": ends, "works": works}
"""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.fixture
def script(scripts: None) -> ModuleType:
    return importlib.import_module("gpu_check")


@pytest.fixture
def broken_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "broken_steps.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    return "broken_steps"


def run_on_a_cpu(
    script: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str
) -> int:
    """The exit code of the script."""
    given = [*options, "--device", "cpu", "--backbone", "shufflenet_v2_x0_5", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *given])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the script sets for its children
    code: int = script.main()
    return code


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_claimed(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / "scripts" / "gpu_check.sh"), "checks", "--out", str(tmp_path / "x.json")],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "no CUDA GPU here: nothing was checked or measured"
    assert not (tmp_path / "x.json").exists()


@pytest.mark.slow
def test_the_checks_themselves_run_on_a_cpu(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "x.json"
    code = run_on_a_cpu(script, out, monkeypatch, "checks")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert printed.out.strip() == str(out)
    checks = json.loads(out.read_text())["checks"]
    assert len(checks) == 15
    assert all(figures["ok"] for figures in checks.values())
    assert {
        "gpu_tests_pass", "gpu_pixels_are_the_cpus", "no_wrong_pixel_beside_the_backbone",
    } <= {name for name, figures in checks.items() if "skipped" in figures}  # fmt: skip
    assert checks["graphs_train_as_direct_steps_do"]["steps"] == 48
    assert checks["processes_reach_what_one_does"]["processes"] == 2
    assert checks["resumed_extraction_has_the_same_bytes"]["photos"] == 24


@pytest.mark.slow
def test_photos_become_a_model_from_the_prompt(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.json"
    steps = ("extract COCO", "train classic on COCO")
    only = [word for step in steps for word in ("--only", step)]
    assert run_on_a_cpu(script, out, monkeypatch, "speeds", *only) == 0
    speeds = json.loads(out.read_text())["speeds"]
    assert tuple(speeds) == steps
    extracted, trained = speeds.values()
    assert extracted["photos"] == 24
    assert 0 < extracted["start_s"] < extracted["seconds_from_the_prompt"]
    assert extracted["peak_memory_mb"] > 100
    assert 0 < trained["before_first_log_line_s"] < trained["seconds_from_the_prompt"]
    assert trained["with_extraction_s"] == pytest.approx(
        trained["seconds_from_the_prompt"] + extracted["seconds_from_the_prompt"]
    )
    assert len(trained["epochs"]) == 2


def test_training_is_checked_without_the_packages_that_decode_photos() -> None:
    code = (
        "import sys, gpu_check, gpu_check_training, gpu_check_training_speeds; "
        "print([m for m in ('simplejpeg', 'torchvision', 'nltk', 'PIL', 'pycocotools') "
        "if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_every_step_has_a_limit_and_a_name_of_its_own(script: ModuleType) -> None:
    names = []
    for groups in script.HALVES.values():
        for group in groups:
            assert list(group.limits) == list(importlib.import_module(group.module).STEPS)
            names += group.limits
    assert len(set(names)) == len(names)
    (group,) = script.chosen(script.CHECKS, ["devices_agree"], 2)
    assert group.limits == {"devices_agree": 120.0}
    parts = [group.part for group in script.chosen(script.SPEEDS, ["train"])]
    assert parts == ["train"]


def test_a_step_that_fails_hangs_or_dies_does_not_stop_the_others(
    scripts: None, broken_steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = importlib.import_module("gpu_check_steps")
    monkeypatch.setattr(steps, "_START_S", 5.0)
    limits = {"fails": 9.0, "hangs": 0.5, "ends": 9.0, "works": 9.0}
    run = steps.Run("cpu", tmp_path, "none", 7, True)
    found = dict(steps.run_steps(broken_steps, limits, run, lambda: 99.0))
    assert list(found) == list(limits)
    assert [figures["ok"] for figures in found.values()] == [False, False, False, True]
    assert found["fails"]["error"] == "AssertionError: other bytes"
    assert "was not done after" in found["hangs"]["error"]
    assert "in hangs" in found["hangs"]["where"]  # where it waits
    assert found["ends"]["error"] == "its process ended (3)"
    assert found["works"]["figure"] == 7
    child = int((tmp_path / "child").read_text())
    assert wait_for(lambda: not is_running(child))


def test_a_script_that_is_killed_leaves_no_child(
    scripts: None, broken_steps: str, tmp_path: Path
) -> None:
    code = (
        "import gpu_check_steps as s; from pathlib import Path; "
        f"run = s.Run('cpu', Path({str(tmp_path)!r}), 'none', 7, True); "
        f"list(s.run_steps({broken_steps!r}, {{'hangs': 60.0}}, run, lambda: 60.0))"
    )
    paths = f"{tmp_path}:{ROOT / 'scripts'}:{ROOT}"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}
    ) as process:
        child = wait_for_child(tmp_path)
        process.kill()
    assert wait_for(lambda: not is_running(child))


def test_an_interrupted_half_ends_its_children(
    script: ModuleType, broken_steps: str, tmp_path: Path
) -> None:
    steps = importlib.import_module("gpu_check_steps")
    run = steps.Run("cpu", tmp_path, "none", 7, True)
    groups = [script.Group("train", broken_steps, {name: 60.0}) for name in ("hangs", "works")]

    def interrupt(name: str, figures: object) -> None:
        if name == "works":
            wait_for_child(tmp_path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        script.run_groups(groups, run, interrupt, side_by_side=True, limit_s=60.0)
    assert wait_for(lambda: not is_running(wait_for_child(tmp_path)))


def wait_for_child(work: Path) -> int:
    """The process that the step `hangs` has started."""
    file = work / "child"
    wait_for(lambda: file.exists() and file.read_text())
    return int(file.read_text())


def wait_for(condition: Callable[[], Any]) -> Any:
    """What the condition gives once it is true; what it gives after a minute, if it is not."""
    deadline = time.monotonic() + 60
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def is_running(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except OSError:
        return False


def test_steps_without_time_are_named(scripts: None, broken_steps: str, tmp_path: Path) -> None:
    steps = importlib.import_module("gpu_check_steps")
    run = steps.Run("cpu", tmp_path, "none", 7, True)
    found = dict(steps.run_steps(broken_steps, {"works": 9.0, "fails": 9.0}, run, lambda: 0.0))
    late = {"ok": False, "error": "no time left"}
    assert found == {"works": late, "fails": late}


def test_a_failed_check_is_an_exit_code(
    script: ModuleType, broken_steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = script.Group("train", broken_steps, {"fails": 9.0, "works": 9.0})
    monkeypatch.setattr(script, "HALVES", {"checks": (group,), "speeds": ()})
    out = tmp_path / "x.json"
    assert run_on_a_cpu(script, out, monkeypatch) == 1
    checks = json.loads(out.read_text())["checks"]
    assert checks["fails"]["error"] == "AssertionError: other bytes"
    assert (checks["works"]["ok"], checks["works"]["figure"]) == (True, 24)


def test_a_wrong_pixel_of_another_decoder_is_found(scripts: None) -> None:
    decoding = importlib.import_module("gpu_check_decoding")
    photos = importlib.import_module("gpu_check_photos")
    kinds = photos.photos_of_every_kind(small=True)
    files = [kinds["444"][-1], kinds["gray"][-1], kinds["truncated"][0], kinds["cmyk"][0]]

    def changed(data: Sequence[bytes], by: int, taken: list[int]) -> object:
        pixels = np.zeros((len(taken), 1, 3, 32, 32), np.uint8)
        for place, number in enumerate(taken):
            if number != 2:
                pixels[place] = preprocess(data[number], 32).numpy()
        pixels[0, 0, 1, 4, 5] ^= by
        return pixels, taken

    def found(by: int, taken: list[int]) -> dict[str, object]:
        figures: dict[str, object] = decoding.compare(
            files, 32, ("full",), lambda data: changed(data, by, taken)
        )
        return figures

    fine = {"photos": 4, "taken": 3, "wrong": 0, "levels": 0, "accepted": 0, "first": []}
    assert found(0, [0, 1, 3]) == fine
    assert found(1, [1, 0, 3]) == fine | {"wrong": 1, "levels": 1, "first": [1]}
    accepted = {"taken": 2, "wrong": 1, "accepted": 1, "first": [2]}
    assert found(0, [0, 2]) == fine | accepted


def test_a_stand_in_for_the_gpu_passes_the_checks_of_decoding(
    scripts: None, tmp_path: Path
) -> None:
    stand_in = pytest.importorskip("tests.gpu_stand_in")
    gpu = pytest.importorskip("pipeline.photos.gpu.decoder")
    decoding = importlib.import_module("gpu_check_decoding")
    decoder = gpu.GpuDecoder(
        torch.device("cpu"),
        64,
        ("full", "center"),
        batch_decoder=stand_in.StandInDecoder(),
        kernels=stand_in.resize_kernels(),
        scratch_bytes=16 << 20,
    )
    found = decoding.compare_kinds(decoder, 40, small=True)
    assert all(figures["wrong"] == 0 for figures in found.values()), found
    assert found["444"]["taken"] > 0
    assert found["420"]["taken"] == 0
    assert found["progressive"]["taken"] == 0
    decoder.close()


def test_photos_are_decoded_beside_a_busy_backbone(scripts: None, tmp_path: Path) -> None:
    stand_in = pytest.importorskip("tests.gpu_stand_in")
    gpu = pytest.importorskip("pipeline.photos.gpu.decoder")
    decoding = importlib.import_module("gpu_check_decoding")
    photos = importlib.import_module("gpu_check_photos")
    decoder = gpu.GpuDecoder(
        torch.device("cpu"),
        64,
        ("full",),
        batch_decoder=stand_in.StandInDecoder(),
        kernels=stand_in.resize_kernels(),
        scratch_bytes=16 << 20,
    )
    backbone = load_backbone("shufflenet_v2_x0_5", "random")
    files = photos.photos_of_every_kind(small=True)["444"]
    figures = decoding.decode_beside(decoder, backbone, files, 10, 4)
    assert figures["photos"] == 10
    assert figures["distinct"] > 1
    assert figures["wrong"] == figures["refused"] == figures["features_changed"] == 0
    decoder.close()


def test_caches_of_two_decoders_are_compared_to_the_bit(scripts: None, tmp_path: Path) -> None:
    extraction = importlib.import_module("gpu_check_extraction")
    features = np.ones((3, 1, 4), np.float16)
    digests = np.zeros((3, 16), np.uint8)
    first = small_cache(tmp_path / "a.h5", features, digests, "broken")
    assert extraction.differing_rows(first, first) == []
    features[0, 0, 2] = np.nextafter(np.float16(1), np.float16(2))
    digests[1, 3] = 9
    second = small_cache(tmp_path / "b.h5", features, digests, "broken too")
    lines = extraction.differing_rows(first, second)
    assert lines[0] == "0.jpg: features"
    assert lines[1].startswith("1.jpg: digests [")
    assert lines[2] == "2.jpg: 'broken' and 'broken too'"


def small_cache(
    path: Path, features: NDArray[np.float16], digests: NDArray[np.uint8], reason: str
) -> FeatureCache:
    """A cache of three photos, of which the last is unreadable."""
    names = Strings.pack(f"{number}.jpg" for number in range(3))
    none = Strings.pack([])
    integers = np.zeros(0, np.int32)
    table = CaptionTable(none, integers, integers, np.zeros(1, np.int64), none, np.zeros(0, int))
    encoder = EncoderRecord("resnet18", "check", "0" * 64, 4, 32, ("full",), "none", "float32")
    skeleton = Skeleton(names, names, table, encoder, batch_rows=4)
    with open_writer(path, skeleton, library_versions={}) as writer:
        writer.write(np.arange(2), features[:2], digests[:2])
        writer.set_unreadable(2, reason, digests[2])
    return open_cache(path)


def test_photos_of_every_kind_are_what_their_names_say(scripts: None) -> None:
    photos = importlib.import_module("gpu_check_photos")
    kinds = photos.photos_of_every_kind(small=True)
    factors = {
        "444": (1, 1), "422": (2, 1), "420": (2, 2), "440": (1, 2), "411": (4, 1), "410": (4, 2),
    }  # fmt: skip
    for name, files in kinds.items():
        for data in files:
            try:
                pixels = decode(data)
            except ImageError:
                assert name in ("truncated", "without an end")
                continue
            assert name not in ("truncated", "without an end")
            with Image.open(io.BytesIO(data)) as image:
                if name in factors:
                    layers = image.layer  # type: ignore[attr-defined]
                    assert [layer[1:3] for layer in layers] == [factors[name], (1, 1), (1, 1)]
                assert sorted(pixels.shape[:2]) == sorted(image.size)
                assert ("progressive" in image.info) == (name == "progressive")
    assert len({decode(data).tobytes() for data in kinds["exif orientation"]}) == 8
    gray = decode(kinds["gray"][-1])
    assert (gray[..., 0] == gray[..., 2]).all()
    assert decode(kinds["410"][-1]).std() > 5  # not flat as a whole


def test_damaged_files_differ_from_their_originals_and_come_from_a_seed(scripts: None) -> None:
    photos = importlib.import_module("gpu_check_photos")
    originals = photos.photos_of_every_kind(small=True)["444"]
    damaged = photos.corruptions(originals, 60)
    assert len(damaged) == 60
    assert not set(damaged) & set(originals)
    assert damaged == photos.corruptions(originals, 60)
    assert damaged != photos.corruptions(originals, 60, seed=5)


def test_captions_name_the_photos_that_are_written(scripts: None, tmp_path: Path) -> None:
    speeds = importlib.import_module("gpu_check_speeds")
    speeds._write_captions(tmp_path / "captions.csv", 3)
    with (tmp_path / "captions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"{n:08d}.jpg" for n in range(3) for _ in range(5)]
    assert all(len(row["caption"].split()) == 11 for row in rows)
