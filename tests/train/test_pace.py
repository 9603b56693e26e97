"""Steps are logged by number or by time, and the time that is left is at most what is said."""

from __future__ import annotations

import time

import pytest

from train.config import FixedRecipe
from train.fit.record.pace import Pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def logged(pace: Pace, clock: list[float], step_s: float, steps: int) -> list[int]:
    """The steps after which there is a line."""
    found, count = [], 0
    for step in range(1, steps + 1):
        clock[0] += step_s
        count += 1
        if pace.is_time_to_log(step, count):
            assert pace.since_last_line() == pytest.approx(count * step_s)
            found.append(step)
            count = 0
    return found


def test_by_time_a_fast_device_makes_ten_lines_and_then_four_a_second(clock: list[float]) -> None:
    found = logged(Pace(FixedRecipe(), None), clock, 1 / 2048, 4096)
    assert found[:10] == list(range(10, 101, 10))
    assert found[10:] == list(range(100 + 512, 4097, 512))


def test_by_time_a_slow_device_makes_a_line_every_ten_steps(clock: list[float]) -> None:
    assert logged(Pace(FixedRecipe(), None), clock, 0.5, 200) == list(range(10, 201, 10))


def test_by_number_the_speed_does_not_matter(clock: list[float]) -> None:
    assert logged(Pace(FixedRecipe(), 7), clock, 1 / 2048, 30) == [7, 14, 21, 28]


def test_the_time_left_counts_steps_validations_and_epochs(clock: list[float]) -> None:
    pace = Pace(FixedRecipe(epochs=5, self_critical_epochs=2), None)
    assert pace.seconds_left(0, 100, 0.5) is None  # how long validation takes is not known yet
    pace.end_epoch(60.0, 8.0)
    assert pace.seconds_left(1, 100, 0.5) == 50 + 8 + 3 * 60
    assert pace.seconds_left(4, 10, 0.5) == 5 + 8
    assert pace.seconds_left(5, 10, 0.5) == 5 + 8 + 60
