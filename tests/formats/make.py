"""Writes the files of this folder: what today's code makes of a tiny set of photos and captions.

They were written once and stay as they are: every later version must read them
(`tests/project/test_formats.py`). v0.1.0 has cache format 2, model format 1 and checkpoint format
3; v0.2.0 has cache format 3. A new format gets a folder of its own, written by
`python -m tests.formats.make FOLDER`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from cache.record import EncoderRecord, Shard, Skeleton, Strings, photos_sha256, texts_sha256
from cache.store import DONE, open_cache
from cache.writer import open_writer
from pipeline.captioner.cached import caption_cache
from train.captions.numbering import build_caption_table
from train.config import Recipe, SearchConfig, TrainConfig
from train.fit.reports import EpochLog
from train.fit.run import train
from train.model.bundle import load_bundle

SCENES = ("a dog runs on the beach", "the cat sleeps", "two birds sing", "a man rides a bike")
PHOTOS = 16
UNREADABLE = 5
RECIPE = Recipe(
    embedding_size=16,
    hidden_size=32,
    tie_embeddings=True,
    photo_every_step=True,
    epochs=64,
    batch_size=8,
    learning_rate=0.01,
    min_count=1,
)


def skeleton(rows: slice = slice(None), shard: Shard | None = None) -> Skeleton:
    names = [f"photos/{n:02d} é.jpg" for n in range(PHOTOS)][rows]
    texts = [[f"{SCENES[n % 4].capitalize()}.", f"{SCENES[n % 4]} ."] for n in range(PHOTOS)]
    return Skeleton(
        image_ids=Strings.pack(str(100 + n) for n in range(PHOTOS)[rows]),
        paths=Strings.pack(names),
        captions=build_caption_table(texts[rows]),
        encoder=EncoderRecord(
            backbone="resnet18",
            weights="random",
            weights_sha256="ab" * 32,
            feature_dim=8,
            image_size=64,
            views=("full", "flip"),
            preprocessing="none",
            precision="float32",
        ),
        batch_rows=4,
        shard=shard,
        numbered=np.arange(len(names)) % 2 == 0,
    )


def write_cache(path: Path, made: Skeleton, first: int, *, pending: int = 0) -> None:
    """Features of photo n are near corner n % 4 of a cube; the last `pending` rows are left out."""
    rows = np.arange(len(made.paths) - pending)
    numbers = rows + first
    random = np.random.default_rng(0)
    noise = random.normal(0, 0.1, (PHOTOS, 2, 8))
    features = (np.eye(8)[numbers % 4][:, None] * 2 + noise[numbers]).astype(np.float16)
    digests = np.repeat(numbers.astype(np.uint8)[:, None], 16, 1)
    readable = numbers != UNREADABLE
    with open_writer(path, made, library_versions={"torch": "2.14.1"}) as writer:
        writer.write(rows[readable], features[readable], digests[readable])
        for row in rows[~readable].tolist():
            writer.set_unreadable(row, "cannot decode (file is truncated)", digests[row])


def main(folder: Path) -> None:
    whole = skeleton()
    write_cache(folder / "cache.h5", whole, 0)
    write_cache(folder / "pending.h5", whole, 0, pending=6)
    for number, first in ((1, 0), (2, 8)):
        shard = Shard(
            number=number,
            count=2,
            first_row=first,
            all_rows=PHOTOS,
            all_photos_sha256=photos_sha256(whole.image_ids, whole.paths),
            all_captions_sha256=texts_sha256(whole.captions.texts, whole.captions.rows),
        )
        part = skeleton(slice(first, first + 8), shard)
        write_cache(folder / f"shard-{number}.h5", part, first)
    config = TrainConfig(
        from_cache=folder / "cache.h5",
        out=folder / "run",
        recipe=RECIPE,
        val_share=0.25,
        device="cpu",
        precision="float32",
        select_by="loss",
    )
    reports = train(config)
    for report in reports:  # stopped after the 60th epoch: there is something to resume
        if isinstance(report, EpochLog) and report.epoch + 1 == 60:
            reports.close()
            break
    cache = open_cache(folder / "cache.h5")
    captions = {}
    for name in ("best.cap", "last.cap"):
        model = load_bundle(folder / "run" / name)
        found = caption_cache(model, cache, SearchConfig(beam_size=1))
        captions[name] = {key: " ".join(one.words) for key, one in found.items()}
    expected = {
        "image_ids": list(cache.image_ids),
        "paths": list(cache.paths),
        "errors": [list(pair) for pair in cache.errors()],
        "features": cache.features[cache.rows_with(DONE)].astype(float).round(4).tolist(),
        "texts": list(cache.captions.texts),
        "words": list(cache.captions.words),
        "counts": cache.captions.counts.tolist(),
        "captions": captions,
    }
    text = json.dumps(expected, ensure_ascii=False, indent=1)
    (folder / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
