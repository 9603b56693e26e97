"""`scripts/plan_scale.py`: the simulation against what can be computed without one."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import subprocess
import sys
from types import ModuleType

import pytest

from tests.conftest import ROOT

SCRIPT = ROOT / "scripts" / "plan_scale.py"


@pytest.fixture(scope="module")
def plan_scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_scale", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plan_scale"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("gpus", "photos"), [(1, 1_000_000), (8, 20_480_000), (8, 4_000_000)])
def test_without_chance_it_takes_what_the_formula_says(
    plan_scale: ModuleType, gpus: int, photos: int
) -> None:
    plan = plan_scale.Plan(
        photos=photos,
        gpus=gpus,
        sigma=0.0,
        failure_s=math.inf,
        storage_bytes_per_s=math.inf,
        network_bytes_per_s=math.inf,
    )
    found = plan_scale.simulate(plan, seed=0)
    assert found.seconds == pytest.approx(plan_scale.without_chance(plan), rel=1e-6)
    assert (found.failures, found.redone, found.storage_bound) == (0, 0.0, 0.0)
    assert found.worker_s <= gpus * found.seconds * (1 + 1e-9)


def test_slow_storage_sets_the_rate(plan_scale: ModuleType) -> None:
    plan = plan_scale.Plan(
        photos=20_480_000,
        gpus=64,
        sigma=0.0,
        failure_s=math.inf,
        storage_bytes_per_s=2e9,
        photo_bytes=1e5,
        start_s=0.0,
        shard_start_s=0.0,
        tokenized_per_s=math.inf,
    )
    found = plan_scale.simulate(plan, seed=0)
    assert found.seconds == pytest.approx(20_480_000 * 1e5 / 2e9, rel=1e-6)
    assert found.storage_bound == pytest.approx(1.0)
    slow_network = dataclasses.replace(plan, storage_bytes_per_s=math.inf, network_bytes_per_s=1e8)
    found = plan_scale.simulate(slow_network, seed=0)
    assert found.seconds == pytest.approx(20_480_000 * 1e5 / (64 * 1e8), rel=1e-6)


def test_stragglers_and_failures_cost_time_and_a_seed_gives_one_run(
    plan_scale: ModuleType,
) -> None:
    calm = plan_scale.Plan(photos=40_000_000, gpus=8, sigma=0.0, failure_s=math.inf)
    uneven = dataclasses.replace(calm, sigma=0.5)
    failing = dataclasses.replace(calm, failure_s=600.0)
    runs = [plan_scale.simulate(plan, seed=3) for plan in (calm, uneven, failing)]
    assert runs[0].seconds < min(runs[1].seconds, runs[2].seconds)
    assert runs[2].failures > 0
    # A failure loses two seconds of work at most, not a shard.
    assert 0 < runs[2].redone <= runs[2].failures * 2.0 * 8000
    assert plan_scale.simulate(failing, seed=3) == runs[2]
    assert plan_scale.simulate(failing, seed=4) != runs[2]


def test_it_prints_a_table() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--photos", "5000000", "--gpus", "1,8", "--seeds", "2"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    cells = {line.count("|") for line in lines[:6]}
    assert len(cells) == 1
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| 1", "| 1", "| 8", "| 8"]
