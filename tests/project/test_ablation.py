"""`scripts/ablation.py` on two tiny recipes: what it trains, what it keeps, what it prints."""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import partial
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
    # METEOR's program takes most of the time; `tests/train/test_metrics.py` runs it.
    monkeypatch.setattr(module, "evaluate", partial(module.evaluate, meteor=False))
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
    rows = [line.strip("| ").split(" | ") for line in printed.out.splitlines()]
    assert rows[0] == ["BLEU-1", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
    assert [row[0] for row in rows[2:]] == ["plain", "greedy", "with rewards"]
    for row in rows[2:]:
        assert row[3] == "–"  # no METEOR
        assert all(" to " in cell for cell in (*row[1:3], *row[4:]))
    # A search needs no training, and the self-critical variant continues the plain one's run.
    assert sorted(path.name for path in out.glob("*-0")) == ["plain-0", "with-rewards-0"]
    assert printed.err.count("plain, seed 0") == 2
    assert printed.err.count("with rewards, seed 0") == 1

    changed = json.loads((out / "greedy-1.json").read_text())
    changed |= {"meteor": 0.25, "cider": 0.5}
    (out / "greedy-1.json").write_text(json.dumps(changed))
    ablation.main(cache.path, cache.path, out, seeds=2)
    again = capsys.readouterr()
    assert not again.err
    greedy = again.out.splitlines()[3].strip("| ").split(" | ")
    assert greedy[3] == "25.0"  # of the one run that has it
    assert greedy[5].endswith(" to 50.0)")
