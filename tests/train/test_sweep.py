"""A sweep finds settings, survives interruption, and leaves ordinary runs behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from safetensors.torch import save_file

from cache.errors import CapError
from cache.store import open_cache
from cache.writer import open_writer
from tests.conftest import ROOT, MakeCache, skeleton
from tests.pipeline.test_cli import cap
from train.config import BEST, Recipe, SweepConfig, TrainConfig
from train.fit.data_recipe import data_recipe
from train.fit.record.run_table import RunsError, find_runs, runs_table
from train.fit.reports import SweepNotice, SweepResult, TrialLog
from train.fit.run import train
from train.fit.sweeps.study import (
    SweepError,
    default_recipe,
    ended_trials,
    open_study,
    search_space,
    study_identity,
)
from train.fit.sweeps.sweep import _receive, _RunningTrial, sweep
from train.fit.sweeps.worker import EpochScore, Failed, Finished, Worker
from train.model.bundle import load_bundle, read_training

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
    assert first.settings["learning_rate"] == 0.002
    assert first.settings["hidden_size"] == BEST.hidden_size
    assert result.cider == max(log.cider for log in logs if log.cider is not None)
    bundle = load_bundle(result.folder)
    recorded = {"from_cache": cache, "device": "cpu", **bundle.training["config"]}
    for name, value in result.settings.items():
        assert recorded[name] == value
    found = find_runs(out)
    assert {found_run.path for found_run in found} == {out / f"trial-00{i}" for i in range(3)}
    assert found[0].cider == result.cider

    # The same call has nothing left to do. A call with more trials runs only the additional ones.
    assert run(small(out, cache)) == ([], result)
    more, after = run(small(out, cache, trials=4, jobs=1))
    assert [log.number for log in more] == [3]
    assert after.cider >= result.cider
    assert after.trials == 4
    shutil.rmtree(after.folder)
    _, second = run(small(out, cache, trials=4))
    assert second.folder != after.folder
    assert second.cider <= after.cider
    for folder in out.glob("trial-*"):
        shutil.rmtree(folder)
    with pytest.raises(SweepError, match=r"best\.cap of every finished trial is gone"):
        run(small(out, cache, trials=4))
    with pytest.raises(SweepError, match="began with --epochs 2, asked for --epochs 3; give"):
        run(small(out, cache, epochs=3))


def test_a_sweep_says_once_how_many_photos_are_copies(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    cache = make_cache(CAPTIONS, digests=[1, 1, 1, *range(2, 15)]).path
    first, *logs, _ = sweep(small(tmp_path / "sweep", cache))
    assert isinstance(first, SweepNotice)
    assert first.line().startswith("2 photos are copies of others; ")
    assert [type(log) for log in logs] == [TrialLog] * 3


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
    assert 0.002 in [log.settings["learning_rate"] for log in [first, *logs]]


@pytest.mark.slow
def test_the_result_is_the_best_model_and_its_options_train_it_again(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    texts = [
        [f"a {noun} {verb} here", f"the {noun} {verb}"]
        for noun in ("dog", "cat", "cow", "hen")
        for verb in ("runs", "sits", "sleeps")
    ]
    features = np.random.default_rng(1).standard_normal((12, 8))
    cache, val_cache = make_cache(texts * 4).path, make_cache(texts, features, "val cache.h5").path
    out, again = tmp_path / "sweep", tmp_path / "again"
    config = small(out, cache, val_cache=val_cache, epochs=6, min_count=2, seed=3)
    logs, result = run(config)
    chosen = read_training(result.folder / "best.cap")
    assert result.cider == chosen["scores"]["cider"]
    found = {one.path: one.cider for one in find_runs(out)}
    for log in logs:
        scores = read_training(log.folder / "best.cap")["scores"]
        assert log.cider == scores["cider"] == found[log.folder]
    assert result.cider == max(found.values(), key=lambda cider: cider or 0.0)
    # In this sweep some epoch that was not chosen scores higher.
    lines = (result.folder / "metrics.jsonl").read_text().splitlines()
    assert result.cider < max(json.loads(line).get("cider", 0.0) for line in lines)

    # Not the first trial, whose settings are round numbers.
    assert result.folder.name != "trial-000"
    command = [sys.executable, "-m", "pipeline", "train", *shlex.split(result.options())]
    assert result.threads == max(1, len(os.sched_getaffinity(0)) // 2)
    subprocess.run(
        [*command, "--out", again],
        env={**os.environ, "OMP_NUM_THREADS": str(result.threads)},
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    first, second = load_bundle(result.folder), load_bundle(again)
    assert second.training["scores"] == first.training["scores"]
    assert second.training["config"] == first.training["config"]
    assert second.vocabulary.words == first.vocabulary.words
    weights = second.decoder.state_dict()
    for name, values in first.decoder.state_dict().items():
        assert torch.equal(values, weights[name]), name


FROM, VAL = "from_cache", "val_cache"


@pytest.mark.parametrize(
    ("option", "changes", "problem"),
    [
        (FROM, {"image_size": 96}, "with image_size 64, {cache} has 96; give the cache it began"),
        (FROM, {"precision": "float16"}, "with precision float32, {cache} has float16; give"),
        (FROM, {"preprocessing": "other"}, "with preprocessing none, {cache} has other; give"),
        (FROM, {"views": ("flip",)}, "with views full, {cache} has flip; give"),
        (FROM, {"weights_sha256": "cd" * 32}, "with other weights than {cache} holds; give"),
        (FROM, {"features": np.ones((16, 8))}, "with other rows than {cache} holds; give"),
        (FROM, {"captions": CAPTIONS[::-1]}, "with other captions than {cache} holds; give"),
        (FROM, {"captions": CAPTIONS[:15]}, "with other photos than {cache} holds; give"),
        (VAL, {"features": np.ones((16, 8))}, "with other rows than {cache} holds; give"),
        (VAL, {"captions": CAPTIONS[::-1]}, "with other captions than {cache} holds; give"),
        (VAL, {"captions": CAPTIONS[:15]}, "with other photos than {cache} holds; give"),
    ],
)
def test_a_sweep_goes_on_with_the_data_it_began_with(
    option: str, changes: dict[str, Any], problem: str, make_cache: MakeCache, tmp_path: Path
) -> None:
    """Training itself compares the encoders of both caches."""
    cache = make_cache(CAPTIONS).path
    other = make_cache(**{"captions": CAPTIONS, "name": "other.h5", **changes}).path
    config = small(tmp_path / "sweep", cache, val_cache=cache)
    with study_of(config):
        pass
    changed: Any = {option: other}
    with pytest.raises(SweepError) as error, study_of(dataclasses.replace(config, **changed)):
        pass
    assert str(error.value).startswith(
        f"{config.out}: its sweep began {problem.format(cache=other)}"
    )


def test_a_sweep_notices_rows_that_were_added_to_its_cache(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    cache = make_cache(CAPTIONS)
    rows = np.arange(len(CAPTIONS) - 1)
    path, no_digests = tmp_path / "15.h5", np.zeros((len(CAPTIONS), 16), np.uint8)
    with open_writer(path, skeleton(CAPTIONS), library_versions={}) as writer:
        writer.write(rows, cache.features[rows], no_digests[rows])
        writer.set_unreadable(15, "not there", no_digests[15])
    config = small(tmp_path / "sweep", path)
    with study_of(config):
        pass
    with open_writer(path, skeleton(CAPTIONS), library_versions={}) as writer:
        assert writer.retry_unreadable() == 1
        writer.write(np.array([15]), cache.features[15:], no_digests[15:])
    with pytest.raises(SweepError, match="began with other rows than "):
        next(sweep(config))


def study_of(config: SweepConfig) -> AbstractContextManager[optuna.Study]:
    val_cache = open_cache(config.val_cache) if config.val_cache else None
    cache = open_cache(config.from_cache)
    identity = study_identity(config, cache, val_cache)
    return open_study(config, identity, len(CAPTIONS), default_recipe(config, cache))


def test_a_sweep_goes_on_with_the_settings_it_began_with(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    cache = make_cache(CAPTIONS).path
    config = small(tmp_path / "sweep", cache)
    with study_of(config):
        pass
    cases: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1}, "with --seed 0, asked for --seed 1; give that again, or name another --out"),
        ({"min_count": 2}, "with --min-count 1, asked for --min-count 2; give that again"),
        ({"val_cache": cache}, f"without --val-cache, asked for {cache}; give that again"),
    ]
    for changes, problem in cases:
        with pytest.raises(SweepError) as error:
            next(sweep(dataclasses.replace(config, **changes)))
        assert str(error.value).startswith(f"{config.out}: its sweep began {problem}")


def test_a_sweep_of_version_0_1_0_goes_on_with_the_true_scores(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    """That version recorded a trial's highest CIDEr, and not the seed."""
    cache, out = make_cache(CAPTIONS), tmp_path / "sweep"
    config = small(out, cache.path, trials=1, epochs=1, seed=5)
    recipe = dataclasses.replace(BEST, epochs=1, min_count=1)
    list(train(TrainConfig(cache.path, out / "trial-000", recipe=recipe, seed=5)))
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(out / "sweep.journal"))
    )
    study = optuna.create_study(storage=storage, study_name="sweep", direction="maximize")
    for name, value in {
        "photos": cache.photos_sha256,
        "captions": cache.captions_sha256,
        "weights": cache.encoder.weights_sha256,
        "epochs": 1,
        "min_count": 1,
        "val_cache": "",
    }.items():
        study.set_user_attr(name, value)
    space = search_space(len(CAPTIONS))
    study.enqueue_trial({name: getattr(data_recipe(BEST, 3200), name) for name in space})
    study.tell(study.ask(space), 9.9)
    with pytest.raises(SweepError, match="began with --seed 5, asked for --seed 0"):
        run(dataclasses.replace(config, seed=0))
    other = make_cache(CAPTIONS, name="other.h5", image_size=96).path
    with pytest.raises(SweepError, match="began with image_size 64, "):
        run(dataclasses.replace(config, from_cache=other))
    logs, result = run(config)
    assert logs == []
    assert result.cider == read_training(out / "trial-000" / "best.cap")["scores"]["cider"]
    assert result.threads is None
    # From now on everything is recorded.
    other = make_cache(CAPTIONS, np.ones((16, 8)), name="rows.h5").path
    with pytest.raises(SweepError, match="began with other rows"):
        run(dataclasses.replace(config, from_cache=other))


class FakeWorker:
    """Delivers these messages and records the answers. Then its process is dead."""

    def __init__(self, *messages: object) -> None:
        self.messages = list(messages)
        self.answers: list[object] = []
        self.pipe = self

    def recv(self) -> object:
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)

    def send(self, answer: object) -> None:
        self.answers.append(answer)

    def end(self) -> str:
        return "was killed by signal 9"


def heard(
    out: Path, study: optuna.Study, *messages: object
) -> tuple[TrialLog | None, list[object]]:
    """What is reported of a trial whose worker sends these messages and whose files are `out`."""
    config, worker = SweepConfig(Path("x.h5"), out), FakeWorker(*messages)
    running = _RunningTrial(study.ask(), worker)  # type: ignore[arg-type]
    log = None
    while log is None and (worker.messages or not messages):
        if worker.messages and isinstance(score := worker.messages[0], EpochScore) and score.best:
            write_best(out / f"trial-{running.trial.number:03d}", score.cider)
        log = _receive(config, study, running)
    return log, worker.answers


def write_best(folder: Path, cider: float) -> None:
    """A best.cap of which only the record of its run can be read."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"epoch": 0, "val_loss": 3.0, "scores": {"cider": cider}, "config": {}}
    save_file(
        {"x": torch.zeros(1)},
        folder / "best.cap",
        {"cap_bundle": json.dumps({"version": 1, "training": facts})},
    )


def test_a_hopeless_trial_is_stopped_and_a_failed_one_is_reported(tmp_path: Path) -> None:
    study = optuna.create_study(
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=2),
    )
    for score in (0.5, 0.6):
        scores = EpochScore(score / 2, True), EpochScore(score, True)
        log, answers = heard(tmp_path, study, *scores, Finished())
        assert log is not None
        assert (log.state, log.cider, log.epochs, log.best) == ("complete", score, 2, True)
        assert answers == [True, True]
    # The higher score of an epoch that was not chosen is not the trial's.
    scores = EpochScore(0.55, True), EpochScore(0.7, False)
    log, answers = heard(tmp_path, study, *scores, Finished())
    assert log is not None
    assert (log.state, log.cider, log.best) == ("complete", 0.55, False)
    scores = EpochScore(0.1, True), EpochScore(0.2, True)
    log, answers = heard(tmp_path, study, *scores, Finished())
    assert log is not None
    assert (log.state, log.cider, log.best) == ("stopped", 0.2, False)
    assert answers == [True, False]
    log, _ = heard(tmp_path, study, Failed("the loss is nan", in_every_trial=False))
    assert log is not None
    assert log.state == "failed"
    assert "no score, the loss is nan, 0 epochs" in log.line()
    with pytest.raises(SweepError, match="no captions"):
        heard(tmp_path, study, Failed("no captions", in_every_trial=True))


def test_a_trial_whose_process_dies_is_tried_once_more(tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial({"dropout": 0.3})
    lost, _ = heard(tmp_path, study)
    assert lost is not None
    assert lost.state == "lost"
    cause = "its process was killed by signal 9 (out of memory? try --jobs 1)"
    assert f"trial 0: no score, {cause}; tried once more, 0 epochs" in lost.line()
    failed, _ = heard(tmp_path, study)
    assert failed is not None
    assert (failed.number, failed.state, failed.problem) == (1, "failed", cause)
    assert study.trials[1].system_attrs["fixed_params"] == {"dropout": 0.3}
    assert len(study.trials) == 2
    assert ended_trials(study) == 1


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [1, 2])
def test_a_sweep_goes_on_when_a_process_dies(
    deaths: int, make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, out = make_cache(CAPTIONS).path, tmp_path / "sweep"
    killed: list[str] = []
    config_of: dict[Worker, TrainConfig] = {}
    send = Worker.send

    def kill_and_send(self: Worker, message: object) -> None:
        if isinstance(message, TrainConfig):
            config_of[self] = message
        elif config_of[self].recipe.learning_rate == 0.002 and len(killed) < deaths:
            # After its first epoch.
            os.kill(self._process.pid or 0, signal.SIGKILL)
            self._process.join()
            killed.append(config_of[self].out.name)
        send(self, message)

    monkeypatch.setattr(Worker, "send", kill_and_send)
    logs, result = run(small(out, cache))
    assert len(killed) == deaths
    states = sorted(log.state for log in logs)
    if deaths == 1:
        assert states == ["complete", "complete", "complete", "lost"]
    else:
        assert states == ["complete", "complete", "failed", "lost"]
        (failed,) = [log for log in logs if log.state == "failed"]
        assert failed.settings["learning_rate"] == 0.002
        assert "its process was killed by signal 9" in failed.line()
    assert result.trials == 3
    complete = [log.cider for log in logs if log.state == "complete"]
    assert result.cider == max(cider for cider in complete if cider is not None)


def test_terminating_a_sweep_ends_its_workers(make_cache: MakeCache, tmp_path: Path) -> None:
    """In the middle of an epoch too, which is long here."""
    cache, out = make_cache([captions * 1000 for captions in CAPTIONS]).path, tmp_path / "sweep"
    options = f"--from-cache {cache} --out {out} --min-count 1 --device cpu --jobs 2"
    parent = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "sweep", *options.split()],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        logs = [out / f"trial-00{i}" / "metrics.jsonl" for i in range(2)]
        wait_until(lambda: all(log.exists() and log.stat().st_size for log in logs))
        workers = children(parent.pid)
        assert len(workers) >= 2
        assert all(map(is_running, workers))
    finally:
        parent.terminate()
        parent.wait()
    wait_until(lambda: not any(map(is_running, workers)))
    # Neither went on to the end of its epoch.
    for log in logs:
        assert "val_loss" not in log.read_text().splitlines()[-1]


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(parent: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                found.append(int(status.parent.name))
    return found


def is_running(process: int) -> bool:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[0] != "Z"  # ended, but nobody has asked for its exit code


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
    assert f"--from-cache {cache} --seed 0 --device cpu --epochs 1 --min-count 1 " in printed
    assert "--hidden-size 512" in printed
    assert "trial 0: CIDEr" in err
    assert "with OMP_NUM_THREADS=" in err
    result = json.loads(cap(*arguments, "--min-count", 1, "--device", "cpu", "--json")[0])
    assert result["trials"] == 1
    table, _ = cap("runs", out)
    assert table.splitlines()[2].startswith(f"{out}/trial-000")
    (listed,) = json.loads(cap("runs", out, "--json")[0])
    assert listed["cider"] == result["cider"]
    assert listed["settings"]["hidden_size"] == 512
    _, err = cap("runs", tmp_path / "absent", code=1)
    assert err == f"error: {tmp_path}/absent: no such folder\n"


def write_metrics(folder: Path, *epochs: dict[str, Any], torn: bool = False) -> None:
    folder.mkdir(parents=True)
    lines = [json.dumps(epoch) for epoch in epochs] + (['{"epoch": 9, "val_l'] if torn else [])
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def test_runs_that_record_nothing_of_their_photos_are_listed_in_no_order(tmp_path: Path) -> None:
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
    assert [one.path.name for one in found] == ["begun", "better", "good", "old"]
    assert {(one.group, one.rank, one.judged_on) for one in found} == {(None, None, None)}
    assert (found[2].cider, found[2].best_epoch, found[2].epochs) == (0.4, 0, 2)
    assert (found[3].cider, found[3].val_loss) == (None, 1.0)
    assert (found[0].epochs, found[0].val_loss) == (0, None)
    assert "no best.cap" in found[0].problem
    headline, _, *table = runs_table(found).splitlines()
    assert headline == "not recorded what these were judged on, so they are in no order:"
    assert table[2].split()[1:] == ["40.00", "10.00", "3.0000", "2"]
    assert table[0].split()[1:] == ["-", "-", "-", "0"]


def test_a_run_is_listed_with_the_scores_of_the_model_it_chose(
    make_cache: MakeCache, tmp_path: Path
) -> None:
    cache = make_cache(CAPTIONS)
    recipe = Recipe(embedding_size=8, hidden_size=16, batch_size=8, epochs=1, min_count=1)
    settings: dict[str, Any] = {"recipe": recipe, "device": "cpu"}
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
    header = runs_table(find_runs(tmp_path)).splitlines()[1]
    assert header.split() == ["run", "CIDEr", "BLEU-4", "val", "loss", "done"]


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
    recipe = Recipe(embedding_size=8, hidden_size=16, batch_size=8, epochs=1, min_count=1)
    config = TrainConfig(make_cache(CAPTIONS).path, tmp_path / "run", recipe=recipe, device="cpu")
    with contextlib.closing(train(config)) as reports:
        next(reports), next(reports)
    (listed,) = find_runs(tmp_path)
    assert (listed.epochs, listed.best_epoch, listed.cider) == (0, None, None)
    assert listed.settings["hidden_size"] == 16


def test_a_folder_without_runs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunsError, match="no runs below it"):
        find_runs(tmp_path)
