"""A sweep finds settings, survives interruption, and leaves ordinary runs behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from cache.errors import CapError
from tests.conftest import MakeCache
from tests.pipeline.test_cli import cap
from train.config import BEST, Recipe, SweepConfig, TrainConfig
from train.fit.reports import SweepResult, TrialLog
from train.fit.run import train
from train.fit.run_table import RunsError, find_runs, runs_table
from train.fit.sweep import _receive, _RunningTrial, sweep
from train.fit.sweep_study import SweepError
from train.fit.sweep_worker import EpochScore, Failed, Finished
from train.model.bundle import load_bundle

CAPTIONS = [[f"a {noun} runs", f"the {noun} is here"] for noun in ("dog", "cat", "cow", "hen")] * 4


def small(out: Path, cache: Path, **changes: Any) -> SweepConfig:
    settings = {"trials": 3, "epochs": 2, "jobs": 2, "min_count": 1, "device": "cpu"}
    return SweepConfig(from_cache=cache, out=out, **{**settings, **changes})


def run(config: SweepConfig) -> tuple[list[TrialLog], SweepResult]:
    *logs, result = sweep(config)
    assert isinstance(result, SweepResult)
    return [log for log in logs if isinstance(log, TrialLog)], result


def test_a_sweep_leaves_its_trials_as_runs_and_names_the_best(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    cache, out = make_cache(CAPTIONS).path, tmp_path / "sweep"
    logs, result = run(small(out, cache))
    assert sorted(log.number for log in logs) == [0, 1, 2]
    assert all(log.state == "complete" and log.epochs == 2 for log in logs)
    # The default recipe is always among the candidates.
    first = next(log for log in logs if log.number == 0)
    assert first.settings["learning_rate"] == BEST.learning_rate
    assert first.settings["hidden_size"] == BEST.hidden_size
    assert result.cider == max(log.cider for log in logs if log.cider is not None)
    bundle = load_bundle(result.folder)
    for name, value in result.settings.items():
        assert bundle.training["config"][name] == value
    found = find_runs(out)
    assert {found_run.path for found_run in found} == {out / f"trial-00{i}" for i in range(3)}
    assert found[0].cider == result.cider

    # The same call has nothing left to do. A call with more trials runs only the additional ones.
    assert run(small(out, cache)) == ([], result)
    more, after = run(small(out, cache, trials=4, jobs=1))
    assert [log.number for log in more] == [3]
    assert after.cider >= result.cider
    assert after.trials == 4
    with pytest.raises(SweepError, match="began with other epochs; name another --out"):
        run(small(out, cache, epochs=3))


def test_an_interrupted_sweep_goes_on(make_cache: MakeCache, tmp_path: Path) -> None:
    cache, out = make_cache(CAPTIONS).path, tmp_path / "sweep"
    begun = sweep(small(out, cache, trials=4))
    first = next(begun)
    assert isinstance(first, TrialLog)
    with pytest.raises(SweepError, match="another sweep is running"):
        next(sweep(small(out, cache)))
    begun.close()  # type: ignore[attr-defined]  # as Ctrl-C does, with a trial under way
    logs, result = run(small(out, cache, trials=4))
    assert len(logs) == 3
    assert result.trials == 4
    assert first.number not in [log.number for log in logs]
    # The interrupted trial was tried again with its settings, and its unfinished run was deleted.
    assert len(find_runs(out)) == 4
    assert BEST.learning_rate in [log.settings["learning_rate"] for log in [first, *logs]]


class Pipe:
    """Stands in for a worker's pipe: delivers these messages and records the answers."""

    def __init__(self, *messages: object) -> None:
        self.messages = list(messages)
        self.answers: list[object] = []

    def recv(self) -> object:
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)

    def send(self, answer: object) -> None:
        self.answers.append(answer)


def heard(study: optuna.Study, *messages: object) -> tuple[TrialLog | None, list[object]]:
    running, pipe = _RunningTrial(study.ask()), Pipe(*messages)
    log = None
    config = SweepConfig(Path("x.h5"), Path("out"))
    while log is None and pipe.messages:
        log = _receive(config, study, pipe, running)  # type: ignore[arg-type]
    return log, pipe.answers


def test_a_hopeless_trial_is_stopped_and_a_failed_one_is_reported() -> None:
    study = optuna.create_study(
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=2),
    )
    for score in (0.5, 0.6):
        log, answers = heard(study, EpochScore(score / 2), EpochScore(score), Finished())
        assert log is not None
        assert (log.state, log.cider, log.epochs, log.best) == ("complete", score, 2, True)
        assert answers == [True, True]
    log, answers = heard(study, EpochScore(0.1), EpochScore(0.2), Finished())
    assert log is not None
    assert (log.state, log.cider, log.best) == ("stopped", 0.2, False)
    assert answers == [True, False]
    log, _ = heard(study, Failed("the loss is nan", in_every_trial=False))
    assert log is not None
    assert log.state == "failed"
    assert "no score, the loss is nan, 0 epochs" in log.line()
    with pytest.raises(SweepError, match="no captions"):
        heard(study, Failed("no captions", in_every_trial=True))


def test_a_worker_that_dies_is_one_line() -> None:
    study = optuna.create_study(direction="maximize")
    config = SweepConfig(Path("x.h5"), Path("out"))
    with pytest.raises(SweepError, match="out/trial-000: its process died"):
        _receive(config, study, Pipe(), _RunningTrial(study.ask()))  # type: ignore[arg-type]


def test_without_captions_or_optuna_a_sweep_says_so(
    make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = make_cache([[], []], name="bare.h5").path
    with pytest.raises(CapError, match="holds no captions"):
        run(small(tmp_path / "bare", bare, jobs=1))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SweepError, match="pip install 'optuna"):
        run(small(tmp_path / "sweep", bare))


def test_the_commands_sweep_and_list(make_cache: MakeCache, tmp_path: Path) -> None:
    cache, out = make_cache(CAPTIONS).path, tmp_path / "sweep"
    arguments = ("sweep", "--from-cache", cache, "--out", out, "--trials", 1, "--epochs", 1)
    printed, err = cap(*arguments, "--min-count", 1, "--device", "cpu")
    assert printed.startswith(f"{out}/trial-000/best.cap (CIDEr ")
    assert "--hidden-size 512" in printed
    assert "trial 0: CIDEr" in err
    result = json.loads(cap(*arguments, "--min-count", 1, "--device", "cpu", "--json")[0])
    assert result["trials"] == 1
    table, _ = cap("runs", out)
    assert table.splitlines()[1].startswith(f"{out}/trial-000")
    (listed,) = json.loads(cap("runs", out, "--json")[0])
    assert listed["cider"] == result["cider"]
    assert listed["settings"]["hidden_size"] == 512
    _, err = cap("runs", tmp_path / "absent", code=1)
    assert err == f"error: {tmp_path}/absent: no such folder\n"


def write_metrics(folder: Path, *epochs: dict[str, Any], torn: bool = False) -> None:
    folder.mkdir(parents=True)
    lines = [json.dumps(epoch) for epoch in epochs] + (['{"epoch": 9, "val_l'] if torn else [])
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def test_runs_are_ranked_by_their_best_epoch(tmp_path: Path) -> None:
    write_metrics(
        tmp_path / "good",
        {"epoch": 0, "step": 10, "loss": 5.0},
        {"epoch": 0, "val_loss": 3.0, "cider": 0.4, "bleu_4": 0.1},
        {"epoch": 1, "val_loss": 2.9, "cider": 0.3, "bleu_4": 0.1},
        torn=True,
    )
    write_metrics(tmp_path / "deep/better", {"epoch": 0, "val_loss": 3.5, "cider": 0.5})
    write_metrics(tmp_path / "old", {"epoch": 0, "val_loss": 1.0})
    write_metrics(tmp_path / "begun", {"epoch": 0, "step": 10, "loss": 5.0})
    found = find_runs(tmp_path)
    assert [one.path.name for one in found] == ["better", "good", "old", "begun"]
    assert (found[1].cider, found[1].best_epoch, found[1].epochs) == (0.4, 0, 2)
    assert (found[2].cider, found[2].val_loss) == (None, 1.0)
    assert (found[3].epochs, found[3].val_loss) == (0, None)
    assert "no best.cap" in found[0].problem
    table = runs_table(found).splitlines()
    assert table[2].split()[1:] == ["40.00", "10.00", "3.0000", "2"]
    assert table[4].split()[1:] == ["-", "-", "-", "0"]


def test_a_run_is_listed_with_the_scores_of_the_model_it_chose(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    cache = make_cache(CAPTIONS)
    recipe = Recipe(embedding_size=8, hidden_size=16, batch_size=8, epochs=1)
    settings: dict[str, Any] = {"recipe": recipe, "min_count": 1, "device": "cpu"}
    run = tmp_path / "run"
    list(train(TrainConfig(cache.path, run, select_by="loss", **settings)))
    chosen = load_bundle(run / "best.cap").training
    # An epoch with a higher CIDEr that was not chosen.
    later = {"epoch": 1, "val_loss": 99.0, "cider": 9.0, "bleu_4": 0.9, "best": False}
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps(later) + "\n")
    (listed,) = find_runs(tmp_path)
    assert (listed.best_epoch, listed.val_loss) == (0, chosen["val_loss"])
    assert listed.cider == chosen["scores"]["cider"]
    assert listed.epochs == 2
    # A run without a model has no known settings, so it makes no setting differ.
    write_metrics(tmp_path / "begun", {"epoch": 0, "step": 10, "loss": 5.0})
    header = runs_table(find_runs(tmp_path)).splitlines()[0]
    assert header.split() == ["run", "CIDEr", "BLEU-4", "val", "loss", "done"]
    by_beam = dataclasses.replace(listed, settings={"select_by": "beam"})
    assert "CIDEr, beam" in runs_table([by_beam, by_beam])


def test_a_run_is_listed_with_the_epoch_that_was_chosen_if_its_models_are_unreadable(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    write_metrics(
        run,
        {"epoch": 0, "val_loss": 3.0, "cider": 0.6, "bleu_4": 0.1, "best": True},
        {"epoch": 1, "val_loss": 2.5, "cider": 0.5, "bleu_4": 0.2, "best": True},
        {"epoch": 2, "val_loss": 2.6, "cider": 0.7, "bleu_4": 0.3, "best": False},
    )
    (run / "best.cap").write_bytes(b"damaged")
    (listed,) = find_runs(tmp_path)
    assert "not a model file" in listed.problem
    assert (listed.best_epoch, listed.cider, listed.bleu_4) == (1, 0.5, 0.2)


def test_a_run_stopped_in_its_first_epoch_has_no_best_epoch(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    recipe = Recipe(embedding_size=8, hidden_size=16, batch_size=8, epochs=1)
    config = TrainConfig(
        make_cache(CAPTIONS).path, tmp_path / "run", recipe=recipe, min_count=1, device="cpu"
    )
    with contextlib.closing(train(config)) as reports:
        next(reports), next(reports)
    (listed,) = find_runs(tmp_path)
    assert (listed.epochs, listed.best_epoch, listed.cider) == (0, None, None)
    assert listed.settings["hidden_size"] == 16


def test_a_folder_without_runs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunsError, match="no runs below it"):
        find_runs(tmp_path)
