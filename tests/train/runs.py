"""Small training runs for tests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from cache.store import FeatureCache
from train.config import Recipe, TrainConfig
from train.model.bundle import load_bundle

WORDS = ("a", "the", "dog", "cat", "bird", "runs", "sleeps", "sings", "on", "under", "hill")
SMALL: dict[str, Any] = {"embedding_size": 8, "hidden_size": 16, "epochs": 3, "batch_size": 16}


def config(
    cache: FeatureCache,
    out: Path,
    epochs: int = 3,
    recipe: Recipe | None = None,
    **changes: object,
) -> TrainConfig:
    """A small run. changes: fields of the recipe or of the run."""
    if recipe is None:
        recipe = Recipe(
            embedding_size=8,
            hidden_size=16,
            batch_size=16,
            learning_rate=0.01,
            epochs=epochs,
            min_count=1,
        )
    fields = {field.name for field in dataclasses.fields(Recipe)}
    of_recipe = {name: value for name, value in changes.items() if name in fields}
    settings = {
        "from_cache": cache.path,
        "out": out,
        "recipe": dataclasses.replace(recipe, **of_recipe),  # type: ignore[arg-type]
        "log_every": 2,
        "device": "cpu",
    }
    if not {"val_cache", "val_list"} & set(changes):
        settings["val_share"] = 0.2
    rest = {name: value for name, value in changes.items() if name not in fields}
    return TrainConfig(**(settings | rest))  # type: ignore[arg-type]


def log_lines(run: Path, *without: str) -> list[dict[str, Any]]:
    """The lines of a run's log, without what they tell of time, and without the members named."""
    left_out = {"steps_per_s", "captions_per_s", "seconds", *without}
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in left_out} for line in lines]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_bundle(path).decoder.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)
