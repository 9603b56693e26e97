"""An extraction to be killed, in a module that a fork server can load once.

What writes nothing (loading weights, building the network) is done before the fork, so that a
killed process lives for a fraction of a second and most kills come while it writes.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import torch

from pipeline import encoding
from pipeline import extract as module
from pipeline.config import ExtractConfig
from pipeline.encoder import Encoder, encoder_record, load_backbone
from pipeline.loading import LoadedBatch

torch.set_num_threads(1)  # threads would not survive the fork
_encode = encoding._encode


def _encode_slowly(encoder: Encoder, batch: LoadedBatch) -> object:
    time.sleep(0.002)  # more moments to be killed in
    return _encode(encoder, batch)


def run_extraction(photos: Path, out: Path) -> None:
    config = ExtractConfig(
        images=photos,
        out=out,
        backbone="resnet18",
        weights="random",
        image_size=32,
        batch_size=4,
        workers=2,
        precision="float32",
        device="cpu",
    )
    for _ in module.extract(config):
        pass


if __name__ != "__main__":
    module._FLUSH_INTERVAL_S = 0.0  # every batch is safe at once
    vars(encoding).update(_encode=_encode_slowly)
    vars(module).update(
        load_backbone=cache(load_backbone),
        encoder_record=cache(encoder_record),
        Encoder=cache(Encoder),
    )
    _backbone = vars(module)["load_backbone"]("resnet18", "random")
    vars(module)["encoder_record"](_backbone, 32, ("full",), "float32")
    _encoder = vars(module)["Encoder"](
        _backbone,
        device=torch.device("cpu"),
        precision="float32",
        image_size=32,
        views=("full",),
    )
    _encoder.encode(torch.zeros(4, 3, 32, 32, dtype=torch.uint8))  # kernels are made at first use
