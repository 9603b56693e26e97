"""`scripts/ablation.py` on two tiny recipes: what is trained, what is kept, what is printed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cache.store import FeatureCache
from tests.conftest import ROOT, MakeCache
from train.config import Recipe

PLAIN = Recipe(embedding_size=8, hidden_size=8, epochs=2, decay="cosine")
REWARDED = Recipe(embedding_size=8, hidden_size=8, epochs=2, decay="cosine", self_critical_epochs=1)


@pytest.fixture
def cache(make_cache: MakeCache) -> FeatureCache:
    return make_cache(
        [["a dog runs", "the dog ran"], ["a cat"], ["two birds fly"], ["red car"]] * 3
    )


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation", ROOT / "scripts" / "ablation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ablation", module)
    spec.loader.exec_module(module)
    variants = {
        "plain": module.Variant(PLAIN),
        "greedy": module.Variant(PLAIN, module.SearchConfig(beam_size=1)),
        "with rewards": module.Variant(REWARDED),
    }
    monkeypatch.setattr(module, "VARIANTS", variants)
    return module


def test_variants_share_what_they_have_in_common(
    ablation: ModuleType,
    cache: FeatureCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "runs"
    ablation.main(cache.path, cache.path, out, seeds=2)
    printed = capsys.readouterr()
    rows = [line.split(" | ")[0] for line in printed.out.splitlines()]
    assert rows[2:] == ["| plain", "| greedy", "| with rewards"]
    # A search trains nothing, and rewards go on from the epochs without them.
    assert sorted(path.name for path in out.glob("*-0")) == ["plain-0", "with-rewards-0"]
    assert printed.err.count("plain, seed 0") == 2
    assert printed.err.count("with rewards, seed 0") == 1

    changed = json.loads((out / "greedy-1.json").read_text())
    changed["cider"] = 0.5
    (out / "greedy-1.json").write_text(json.dumps(changed))
    ablation.main(cache.path, cache.path, out, seeds=2)
    again = capsys.readouterr()
    assert not again.err
    assert "to 50.0)" in again.out.splitlines()[3]
