"""`cap evaluate`: which photos are scored, and where the results go."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from cache.atomic import WriteError
from cache.store import DONE, open_cache
from pipeline.cli.terminal import ProgressLine
from pipeline.evaluation import result_files
from pipeline.evaluation.result_files import search_name
from tests.conftest import ROOT
from tests.pipeline.test_cli import cap
from train.config import SearchConfig

FORMATS = ROOT / "tests" / "formats" / "v0.2.0"
FAST = ["--no-meteor", "--json"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with a run in `run` and its cache in `a/test.h5`."""
    shutil.copytree(FORMATS / "run", tmp_path / "run")
    (tmp_path / "a").mkdir()
    shutil.copy(FORMATS / "cache.h5", tmp_path / "a" / "test.h5")
    return tmp_path / "run"


def evaluate(run: Path, *options: object, cache: str = "a/test.h5") -> dict[str, Any]:
    out, _ = cap("evaluate", "--model", run, "--cache", run.parent / cache, *FAST, *options)
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def results(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.scores.json"))


def test_results_of_other_searches_models_and_photos_have_other_names(run: Path) -> None:
    (run.parent / "some.txt").write_text("\n".join(open_cache(run.parent / "a/test.h5").paths[:4]))
    evaluate(run)
    evaluate(run, "--beam-size", 1)
    evaluate(run, "--beam-size", 5, "--length-penalty", 0.7)
    evaluate(run, "--sample", "--seed", 7)
    evaluate(run, "--only", run.parent / "some.txt")
    assert results(run) == [
        "best.test.beam1.scores.json",
        "best.test.beam3.scores.json",
        "best.test.beam5-length_penalty0.7.scores.json",
        "best.test.sample-seed7.scores.json",
        "best.test.some.beam3.scores.json",
    ]
    assert len(list(run.glob("*.predictions.json"))) == 5


def test_a_cache_of_the_same_name_does_not_overwrite(run: Path) -> None:
    (run.parent / "b").mkdir()
    shutil.copy(FORMATS / "shard-1.h5", run.parent / "b" / "test.h5")
    evaluate(run)
    first = (run / "best.test.beam3.scores.json").read_text()
    for _ in range(2):  # the second time replaces its own
        evaluate(run, cache="b/test.h5")
        assert (run / "best.test.beam3.scores.json").read_text() == first
        usual, other = sorted(results(run), key=len)
        assert usual == "best.test.beam3.scores.json"
        assert re.fullmatch(r"best\.test\.beam3-[0-9a-f]{8}\.scores\.json", other)
    evaluate(run)
    assert len(results(run)) == 2


def test_results_go_where_they_are_asked_for(run: Path) -> None:
    shutil.copytree(run, run.parent / "other")
    folder = run.parent / "new" / "results"
    before = sorted(run.iterdir())
    evaluate(run, "--out", folder)
    evaluate(run.parent / "other", "--out", folder)
    assert results(folder) == [
        "other.best.test.beam3.scores.json",
        "run.best.test.beam3.scores.json",
    ]
    assert sorted(run.iterdir()) == before


def test_scores_are_shown_even_where_nothing_can_be_written(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise WriteError(f"{path}: cannot write (No space left on device)")

    monkeypatch.setattr(result_files, "write_text", full)
    where = ["--cache", run.parent / "a/test.h5", "--out", run.parent / "new" / "results"]
    out, err = cap("evaluate", "--model", run, *where, "--no-meteor", code=1)
    assert re.search(r"^bleu_4 +\d", out, re.MULTILINE)
    assert err.splitlines()[-1].endswith(".scores.json: cannot write (No space left on device)")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_models_folder_that_is_read_only_costs_the_files_alone(run: Path) -> None:
    run.chmod(0o555)
    try:
        where = ["--cache", run.parent / "a/test.h5"]
        out, err = cap("evaluate", "--model", run, *where, "--no-meteor", code=1)
    finally:
        run.chmod(0o755)
    assert "bleu_4" in out
    assert "cannot write" in err


def test_a_list_chooses_the_photos_of_a_cache(run: Path, tmp_path: Path) -> None:
    cache = open_cache(run.parent / "a/test.h5")
    rows = cache.rows_with(DONE)[:4].tolist()
    (tmp_path / "four.txt").write_text("\n".join(cache.paths[row] for row in rows))
    four = ["--only", tmp_path / "four.txt"]
    assert evaluate(run)["count"] == 15
    assert evaluate(run, *four)["count"] == 4
    written = json.loads((run / "best.test.four.beam3.predictions.json").read_text())
    assert [str(entry["image_id"]) for entry in written] == [cache.image_ids[row] for row in rows]
    all_of_it = json.loads((run / "best.test.beam3.predictions.json").read_text())
    assert all(entry in all_of_it for entry in written)
    people = ["evaluate", "--human", "--cache", cache.path, *FAST]
    assert json.loads(cap(*people, *four)[0])["count"] == 4
    (tmp_path / "odd.txt").write_text("nowhere.jpg")
    _, err = cap(*people, "--only", tmp_path / "odd.txt", code=1)
    assert "1 of 1 names are not among the photos (first: nowhere.jpg)" in err


def test_an_option_of_earlier_versions_is_still_taken(run: Path) -> None:
    where = ["evaluate", "--model", run, "--cache", run.parent / "a/test.h5", "--no-meteor"]
    assert cap(*where, "--no-spice") == cap(*where)  # of 0.1.0, which computed SPICE


def test_a_search_is_called_by_what_is_unusual() -> None:
    assert search_name(SearchConfig()) == "beam3"
    assert search_name(SearchConfig(beam_size=4, groups=2, diversity=0.25)) == (
        "beam4-groups2-diversity0.25"
    )
    assert search_name(SearchConfig(sample=True, top_p=0.9)) == "sample-top_p0.9"


def test_a_long_search_shows_progress_and_a_short_one_does_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with ProgressLine("captioning", "photos", after_s=3.0) as line:
        for done in range(0, 61, 10):
            now += 1
            line.update_timed(done, 60)
    assert capsys.readouterr().err.splitlines() == [
        "captioning: 20/60 photos, 6.7 photos/s, 6 s left",
        "captioning: 60/60 photos, 8.6 photos/s",
    ]
    with ProgressLine("captioning", "photos", after_s=30.0) as line:
        line.update_timed(60, 60)
    assert capsys.readouterr().err == ""


def test_the_last_line_of_progress_is_written_once(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("extracting", "photos") as line:
        line.update(12, 12, 30.0)
        line.update(12, 12, 20.0)
        line.update(0, 4, 20.0)  # photos that are tried again
        line.update(4, 4, 20.0)
    assert len(capsys.readouterr().err.splitlines()) == 2
