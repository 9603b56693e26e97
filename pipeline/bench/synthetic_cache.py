"""A cache of COCO's size with made-up features and captions, for measuring training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cache.record import CaptionTable, EncoderRecord, Skeleton, Strings
from cache.store import DIGEST_BYTES
from cache.writer import open_writer

# COCO train2014.
PHOTOS, CAPTIONS, WORDS, FEATURE_DIM = 82_783, 414_113, 9_944, 2048
_WRITE_ROWS = 4096


def write_synthetic_cache(path: Path, photos: int) -> None:
    """Write a cache with random features and five captions per photo.

    The captions have lengths and word frequencies like COCO's: 11.5 words on average, and Zipf's
    law over 9,944 words that occur at least four times each.
    """
    random = np.random.default_rng(0)
    captions = round(CAPTIONS * photos / PHOTOS)
    lengths = np.clip(np.round(random.gamma(24, 0.32, captions) + 3.8), 7, 50).astype(np.int64)
    offsets = np.zeros(captions + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    shares = 1 / np.arange(1, WORDS + 1)
    tokens = random.choice(WORDS, int(offsets[-1]), p=shares / shares.sum()).astype(np.int32)
    certain = np.repeat(np.arange(WORDS, dtype=np.int32), 4)[: len(tokens)]
    tokens[random.permutation(len(tokens))[: len(certain)]] = certain
    counts = np.bincount(tokens, minlength=WORDS)
    order = np.argsort(-counts, kind="stable")
    ranks = np.empty(WORDS, np.int32)
    ranks[order] = np.arange(WORDS, dtype=np.int32)
    tokens = ranks[tokens]
    counts = counts[order]
    counts = counts[counts > 0]  # a small cache does not contain all words
    words = [f"word{n}" for n in range(len(counts))]
    pieces = np.array(words, object)[tokens]
    texts = (
        " ".join(pieces[start:stop])
        for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    )
    table = CaptionTable(
        texts=Strings.pack(texts),
        rows=(np.arange(captions) * photos // captions).astype(np.int32),
        tokens=tokens,
        token_offsets=offsets,
        words=Strings.pack(words),
        counts=counts.astype(np.int64),
    )
    names = Strings.pack(f"{row:012d}.jpg" for row in range(photos))
    encoder = EncoderRecord(
        backbone="resnet152",
        weights="bench",
        weights_sha256="0" * 64,
        feature_dim=FEATURE_DIM,
        image_size=224,
        views=("full",),
        preprocessing="none",
        precision="float32",
    )
    skeleton = Skeleton(names, names, table, encoder, batch_rows=32)
    block = random.standard_normal((_WRITE_ROWS, 1, FEATURE_DIM)).astype(np.float16)
    digests = np.zeros((_WRITE_ROWS, DIGEST_BYTES), np.uint8)
    with open_writer(path, skeleton, library_versions={}) as writer:
        for start in range(0, photos, _WRITE_ROWS):
            count = min(_WRITE_ROWS, photos - start)
            writer.write(np.arange(start, start + count), block[:count], digests[:count])
