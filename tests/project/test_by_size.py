"""`scripts/by_size.py` on a tiny cache: what it trains, what it keeps, what it prints."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cache.store import open_cache
from tests.conftest import ROOT, MakeCache
from train.config import BEST, CLASSIC

SMALL = {"embedding_size": 8, "hidden_size": 8}


@pytest.fixture
def by_size(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("by_size", ROOT / "scripts" / "by_size.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "by_size", module)
    spec.loader.exec_module(module)
    best = dataclasses.replace(BEST, epochs=2, **SMALL)  # type: ignore[arg-type]
    classic = dataclasses.replace(CLASSIC, min_count=1, **SMALL)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "BEST", best)
    monkeypatch.setattr(module, "CLASSIC", classic)
    monkeypatch.setattr(module, "_CLASSIC_EPOCHS", (1, 3))
    return module


def test_nested_shares_are_trained_once_and_scored(
    by_size: ModuleType, make_cache: MakeCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = [["a dog runs", "the dog ran"], ["a cat"], ["two birds fly"], ["red car"]] * 3
    cache, out = make_cache(captions), tmp_path / "out"
    by_size.main(cache.path, cache.path, out, sizes="6,10", seeds=1)
    printed = capsys.readouterr()
    rows = [line.strip("| ").split(" | ") for line in printed.out.splitlines()]
    assert [row[0] for row in rows[2:]] == ["6", "10"]
    assert all(row[2].startswith("2 epochs in ") for row in rows[2:])
    small, large = (open_cache(out / f"{size}.h5") for size in (6, 10))
    assert list(small.paths) == list(large.paths)[:6]
    by_path = {path: row for row, path in enumerate(cache.paths)}
    rows_of = [by_path[path] for path in large.paths]
    assert np.array_equal(large.features[:], cache.features[rows_of])
    assert [large.captions.by_row(10)[n] for n in range(10)] == [captions[row] for row in rows_of]
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.json")}
    assert sorted(kept) == sorted(
        f"{name}.json"
        for size in (6, 10)
        for name in (f"best-{size}-0", f"classic-{size}-0-1", f"classic-{size}-0-3")
    )
    scored = json.loads((out / "classic-6-0-3.json").read_text())
    assert scored["epochs"] == 3
    by_size.main(cache.path, cache.path, out, sizes="6,10", seeds=1)
    assert capsys.readouterr().out == printed.out
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.json")} == kept


def test_an_error_is_one_line(
    by_size: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(by_size.typer.Exit):
        by_size.main(tmp_path / "no.h5", tmp_path / "no.h5", tmp_path / "out", sizes="5", seeds=1)
    assert capsys.readouterr().err.startswith("error: ")
