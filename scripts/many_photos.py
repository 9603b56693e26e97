"""What millions of photos cost beside their features: memory, disk and time, stage by stage.

    python scripts/many_photos.py --photos 5000000 --folder /scratch/many

Features and captions are made up: 1,280 numbers a photo, five captions of 11 words each. Stages:
caches are written through the writer of an extraction, listed in a catalogue, merged (with
--merge), shown by `cap info`, and trained on for some steps through a window. Each stage runs in a
process of its own; its peak of memory is sampled every 50 ms, without mapped files ("own") and with
them. The photos are not encoded. With --read, a captions file is read as well, the photos it names
are found in a folder of empty files, and a cache of them is laid out: what an extraction does
before its first photo. A million photos take 4.2 GB of disk, and with --read or --merge 7 GB more
for each; the folder is removed at the end, unless --keep is given.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from cache.record import CaptionTable, EncoderRecord, Skeleton, Strings
from cache.store import DIGEST_BYTES
from cache.writer import open_writer

CAPTIONS, TOKENS, WORDS, DIM = 5, 11, 10_000, 1280
_BLOCK = 4096
_FILES = 10_000  # in a folder


def main(
    folder: Annotated[Path, typer.Option(help="A folder to make and to remove.")],
    photos: Annotated[int, typer.Option(min=2)] = 5_000_000,
    caches: Annotated[int, typer.Option(min=1, help="Caches to write.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 500,
    window: Annotated[str, typer.Option(help="As of `cap train`.")] = "1GB",
    read: Annotated[bool, typer.Option("--read", help="Also read a captions file.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Also merge the caches.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the files.")] = False,
) -> None:
    """Print a line for each stage, and all as JSON at the end."""
    folder.mkdir(parents=True)
    paths = [folder / f"{number}.h5" for number in range(caches)]
    stages: list[dict[str, Any]] = []
    try:
        if read:
            _run("make files", _make_files, folder, photos)
            stages.append(_run("read", _read, folder))
        sizes = np.diff(np.linspace(0, photos, caches + 1).astype(int)).tolist()
        stages.append(_run("write", _write_all, paths, sizes))
        catalogue = folder / "photos.catalogue"
        stages.append(_run("catalogue", _catalogue, paths, catalogue))
        stages.append(_run("info", _info, catalogue))
        stages.append(_run("open", _open, catalogue))
        if merge:
            stages.append(_run("merge", _merge, paths, folder / "merged.h5"))
            stages.append(_run("copy of the merged file", _copy, folder / "merged.h5"))
            (folder / "copy").unlink()
        stages.append(_run("train", _train, catalogue, folder / "run", steps, window))
        for path in (paths[0], catalogue):
            print(f"{path.name}: {path.stat().st_size / 1e9:.2f} GB", flush=True)
    finally:
        if not keep:
            shutil.rmtree(folder)
    print(json.dumps({"photos": photos, "captions": photos * CAPTIONS, "stages": stages}))


def _run(name: str, stage: Any, *arguments: Any) -> dict[str, Any]:
    """Run a stage in a process of its own. Raises SystemExit if it fails."""
    process = multiprocessing.get_context("spawn").Process(target=_told, args=(stage, *arguments))
    started = time.perf_counter()
    process.start()
    own = whole = 0
    while process.is_alive():
        fields = _status(process.pid)
        own, whole = max(own, fields.get("RssAnon", 0)), max(whole, fields.get("VmHWM", 0))
        process.join(0.05)
    seconds = time.perf_counter() - started
    print(f"{name}: {seconds:.1f} s, {own / 1e9:.2f} GB own, {whole / 1e9:.2f} GB", flush=True)
    if process.exitcode:
        raise SystemExit(f"{name} failed")
    return {"name": name, "seconds": seconds, "own_bytes": own, "peak_bytes": whole}


def _status(pid: int | None) -> dict[str, int]:
    """Sizes of a process in bytes; none if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if " kB" in line}


def _told(stage: Any, *arguments: Any) -> None:
    stage(*arguments)


def _make_files(folder: Path, photos: int) -> None:
    """Empty photos, and a CSV with the captions of `_captions`."""
    images, random = folder / "images", np.random.default_rng(0)
    with (folder / "captions.csv").open("w") as file:
        file.write("image,caption\n")
        for first in range(0, photos, _FILES):
            (images / f"part-{first // _FILES:05d}").mkdir(parents=True)
            count = min(_FILES, photos - first)
            table = _captions(count, random)
            names = [f"part-{n // _FILES:05d}/{n:09d}.jpg" for n in range(first, first + count)]
            for name in names:
                (images / name).touch()
            for row, text in zip(table.rows.tolist(), table.texts, strict=True):
                file.write(f"{names[row]},{text.strip()}\n")


def _read(folder: Path) -> None:
    """What `cap extract-features` does before its first photo, but for the encoder."""
    from pipeline.extraction.config import ExtractConfig
    from pipeline.extraction.extract import read_asked, skeleton_of

    config = ExtractConfig(folder / "images", folder / "empty.h5", captions=folder / "captions.csv")
    photos, lines = read_asked(config)
    print("\n".join(lines), flush=True)
    skeleton = skeleton_of(photos, config.tokenizer, _encoder(), batch_rows=32, shard=None)
    del photos
    with open_writer(config.out, skeleton, library_versions={}):
        pass
    config.out.unlink()


def _write_all(paths: list[Path], sizes: list[int]) -> None:
    first = 0
    for number, (path, count) in enumerate(zip(paths, sizes, strict=True)):
        _write(path, first, count, number)
        first += count


def _write(path: Path, first: int, count: int, seed: int) -> None:
    """A cache of photos `first` to `first` + `count` - 1."""
    random = np.random.default_rng(seed)
    names = Strings.pack(f"part-{n // _FILES:05d}/{n:09d}.jpg" for n in range(first, first + count))
    skeleton = Skeleton(names, names, _captions(count, random), _encoder(), batch_rows=32)
    with open_writer(path, skeleton, library_versions={}) as writer:
        for start in range(0, count, _BLOCK):
            rows = np.arange(start, min(count, start + _BLOCK))
            # Random bits of float16 between 1 and 2, which are drawn fast.
            bits = random.integers(0x3C00, 0x4000, (len(rows), 1, DIM), np.uint16)
            digests = random.integers(0, 256, (len(rows), DIGEST_BYTES), np.uint8)
            writer.write(rows, bits.view(np.float16), digests)


def _encoder() -> EncoderRecord:
    return EncoderRecord(
        backbone="mobilenet_v2",
        weights="made up",
        weights_sha256="0" * 64,
        feature_dim=DIM,
        image_size=224,
        views=("full",),
        preprocessing="none",
        precision="float32",
    )


def _captions(photos: int, random: np.random.Generator) -> CaptionTable:
    """Words `w0000 ` and so on, by Zipf's law."""
    captions = photos * CAPTIONS
    # The inverse of the distribution of 1 / n, near enough.
    drawn = np.exp(random.random(captions * TOKENS, np.float32) * np.log(WORDS))
    counts = np.bincount(drawn.astype(np.int32) - 1, minlength=WORDS)
    order = np.lexsort((np.arange(WORDS), -counts))
    order = order[counts[order] > 0]
    number = np.zeros(WORDS, np.int32)
    number[order] = np.arange(len(order))
    names = np.array([f"w{n:04d} ".encode() for n in range(WORDS)]).view(np.uint8).reshape(WORDS, 6)
    spoken = drawn.astype(np.int32) - 1
    return CaptionTable(
        texts=Strings(names[spoken].reshape(-1), np.arange(captions + 1) * (6 * TOKENS)),
        rows=np.repeat(np.arange(photos, dtype=np.int32), CAPTIONS),
        tokens=number[spoken],
        token_offsets=np.arange(captions + 1) * TOKENS,
        words=Strings.pack(f"w{n:04d}" for n in order.tolist()),
        counts=counts[order],
    )


def _catalogue(paths: list[Path], out: Path) -> None:
    from cache.derived.catalogue import write_catalogue

    write_catalogue(paths, out)


def _merge(paths: list[Path], out: Path) -> None:
    from cache.merge import merge

    merge(paths, out)


def _copy(path: Path) -> None:
    """What the disk does with the same bytes."""
    with path.open("rb") as source, path.with_name("copy").open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 24)
        target.flush()
        os.fsync(target.fileno())


def _info(path: Path) -> None:
    from pipeline.cli.app import app

    app(["info", str(path)], standalone_mode=False)


def _open(path: Path) -> None:
    from cache.store import open_cache

    started = time.perf_counter()
    opened = open_cache(path)
    print(f"opened {len(opened):,} rows in {1e3 * (time.perf_counter() - started):.0f} ms")


def _train(path: Path, out: Path, steps: int, window: str) -> None:
    from train.config import CLASSIC, TrainConfig
    from train.fit.reports import Started, StepLog
    from train.fit.run import train

    reports = train(
        TrainConfig(path, out, recipe=CLASSIC, val_share=0.0002, window=window),
        saves_within_epochs=False,
    )
    started = time.perf_counter()
    for step, report in enumerate(reports):
        if isinstance(report, Started):
            print(report.summary())
            print(f"{time.perf_counter() - started:.0f} s until the first step")
        elif isinstance(report, StepLog):
            print(report.line(), flush=True)
        if step == steps:
            break
    reports.close()


if __name__ == "__main__":
    typer.run(main)
