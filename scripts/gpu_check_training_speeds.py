"""The speeds of training steps that `gpu_check.py` measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from gpu_check_steps import Figures, Run

from pipeline.bench.synthetic_cache import PHOTOS, write_synthetic_cache
from pipeline.bench.training.train import bench_train
from train.config import BEST, CLASSIC, Recipe

RECIPES: dict[str, Recipe] = {
    "train classic": CLASSIC,
    "train best": BEST,
    "train classic, hidden 1024 x 2 layers": replace(CLASSIC, hidden_size=1024, num_layers=2),
    "train classic, batch 512": replace(CLASSIC, batch_size=512),
    "train best, batch 512": replace(BEST, batch_size=512),
}


def _step(recipe: Recipe) -> Callable[[Run], Figures]:
    def measure(run: Run) -> Figures:
        cache = run.work / "synthetic.h5"
        if not cache.exists():
            write_synthetic_cache(cache, 500 if run.small else PHOTOS)
        result = bench_train(recipe, device=run.device, cache=cache)
        torch.cuda.empty_cache()
        derived = {
            "ratio": result.ratio,
            "epoch_s": result.epoch_s,
            "limit_epoch_s": result.limit_epoch_s,
            "share_of_limit": result.limit_step_ms / result.fast_step_ms,
            "captions_per_s": result.captions_per_s,
        }
        return asdict(result) | derived

    return measure


STEPS = {name: _step(recipe) for name, recipe in RECIPES.items()}
