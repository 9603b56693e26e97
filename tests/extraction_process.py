"""An extraction to be killed, in a module that a fork server can load once."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import torch

from pipeline import encoding
from pipeline import extract as module
from pipeline.config import ExtractConfig
from pipeline.encoder import Backbone, Encoder, load_backbone
from pipeline.loading import LoadedBatch

torch.set_num_threads(1)  # threads would not survive the fork
_load_once = cache(load_backbone)
_encode = encoding._encode
if __name__ != "__main__":
    _load_once("resnet18", "random")


def run_extraction(photos: Path, out: Path) -> None:
    def load(name: str, weights: str) -> Backbone:
        return _load_once(name, weights)

    def encode_slowly(encoder: Encoder, batch: LoadedBatch) -> object:
        time.sleep(0.015)  # more moments to be killed in, beside the building of the network
        return _encode(encoder, batch)

    vars(module).update(load_backbone=load)
    vars(encoding).update(_encode=encode_slowly)
    module._FLUSH_INTERVAL_S = 0.0  # every batch is safe at once
    config = ExtractConfig(
        images=photos,
        out=out,
        backbone="resnet18",
        weights="random",
        image_size=64,
        batch_size=4,
        workers=2,
    )
    for _ in module.extract(config):
        pass
