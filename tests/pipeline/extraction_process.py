"""An extraction that a test kills. A fork server (`extraction_server`) loads this module once."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import torch

from pipeline.encoder.encoder import Encoder, encoder_record
from pipeline.encoder.weights import load_backbone
from pipeline.extraction import encode_batches, extract, fill
from pipeline.extraction.config import ExtractConfig
from pipeline.photos.photo_loader import LoadedBatch


@cache
def prepare() -> None:
    """Do everything that writes nothing (loading weights, building the network) before the fork.

    A process then lives for a fraction of a second, and most kills come while it writes.
    """
    torch.set_num_threads(1)  # threads would not survive the fork
    backbone = load_backbone("resnet18", "random")
    record = encoder_record(backbone, 32, ("full",), "float32")
    encoder = Encoder(
        backbone,
        device=torch.device("cpu"),
        precision="float32",
        image_size=32,
        views=("full",),
    )
    encoder.encode(torch.zeros(4, 3, 32, 32, dtype=torch.uint8))  # oneDNN compiles its kernels
    encode = encode_batches._encode

    def encode_slowly(encoder: Encoder, batch: LoadedBatch) -> object:
        time.sleep(0.002)  # more time in which the process can be killed
        return encode(encoder, batch)

    fill._FLUSH_INTERVAL_S = 0.0  # every batch is flushed at once
    vars(encode_batches).update(_encode=encode_slowly, Encoder=lambda *_, **settings: encoder)
    vars(extract).update(load_backbone=lambda *_: backbone, encoder_record=lambda *_: record)


def run_extraction(photos: Path, out: Path) -> None:
    prepare()
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
    for _ in extract.extract(config):
        pass
