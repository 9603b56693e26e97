"""The whole job on drawn scenes: draw, extract, train, evaluate, predict. Downloads nothing.

The scenes are treated like any photos: every step is one that a command line command takes.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import CapError
from pipeline.captioner.captioner import Captioner
from pipeline.demo.config import DemoConfig
from pipeline.demo.scenes import Scene, draw_scene, named_right
from pipeline.evaluation.evaluate import Evaluation, evaluate
from pipeline.extraction.config import ExtractOptions, settled
from pipeline.extraction.extract import extract
from pipeline.gallery.sheet.sheet import Tile, write_sheet
from train.config import CLASSIC, SearchConfig, TrainConfig
from train.fit.reports import EpochLog
from train.fit.run import train
from train.scores.metrics import Scores, score

OWN_BACKBONE = "shufflenet_v2_x0_5"
# Trained by scripts/train_demo_backbone.py on scenes with seeds from 1,000,000 on.
OWN_WEIGHTS = Path(__file__).parent / "demo_backbone.pth"
_TEST_SEED = 500_000
_SHOWN = 20
_MARKER = "cap-demo.json"
_SHEET = "contact-sheet.png"
# All that a demo makes. Other files that are there by then are the user's.
_MADE = (*("train", "train.csv", "train.h5", "test", "test.csv", "test.h5", "run"), _SHEET, _MARKER)


@dataclass(frozen=True)
class DemoResult:
    """How well held-out scenes are captioned."""

    scores: Scores
    control: Scores  # of the same captions on other scenes
    objects: int  # in all held-out scenes
    nouns_right: int  # objects that are named
    colors_right: int  # objects that are named with the right colour
    examples: tuple[tuple[str, str, str], ...]  # photo, predicted, first true caption
    contact_sheet: Path
    seconds: float

    def summary(self) -> str:
        lines = ["", "held-out scenes: predicted caption, then one of the true ones"]
        for path, predicted, true in self.examples:
            lines += [f"{Path(path).name}  {predicted}", f"{'':{len(Path(path).name)}}  {true}"]
        lines += [
            "",
            f"BLEU-4 {100 * self.scores.bleu_4:.1f}, CIDEr {100 * self.scores.cider:.1f} on "
            f"{self.scores.count} held-out scenes; the same captions on other scenes: "
            f"BLEU-4 {100 * self.control.bleu_4:.1f}, CIDEr {100 * self.control.cider:.1f} "
            "(scores times 100)",
            f"of {self.objects} objects {self.nouns_right / self.objects:.0%} are named, "
            f"{self.colors_right / self.objects:.0%} with the right colour",
            f"{self.contact_sheet} shows scenes and captions; the demo took {self.seconds:.0f} s",
        ]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        return {
            "scores": self.scores.as_dict(),
            "control": self.control.as_dict(),
            "objects": self.objects,
            "nouns_right": self.nouns_right,
            "colors_right": self.colors_right,
            "contact_sheet": str(self.contact_sheet),
            "seconds": round(self.seconds, 1),
        }


def run_demo(config: DemoConfig) -> Iterator[str | DemoResult]:
    """Run the demo in the folder `config.out`. What an earlier demo made there is replaced.

    Yields messages for the user, then the result. Raises CapError if the folder cannot be written
    or holds something else than a demo, and the errors of the steps.
    """
    started = time.perf_counter()
    with _writing(config.out):
        _prepare(config.out)
    own = config.weights is None and config.backbone == OWN_BACKBONE
    weights = config.weights or (str(OWN_WEIGHTS) if own else None)
    if own:
        yield (
            f"backbone: a {OWN_BACKBONE} that was trained on other drawn scenes, because a network "
            "with random weights cannot tell colours or shapes"
        )
    truth: dict[str, Scene] = {}
    for split, first, count in (
        ("train", 0, config.train_scenes),
        ("test", _TEST_SEED, config.test_scenes),
    ):
        with _writing(config.out):
            scenes = _draw(config.out / split, first, count)
        if split == "test":
            truth = scenes
        yield f"drew {count} scenes into {config.out / split}"
        cache = config.out / f"{split}.h5"
        extraction, _ = settled(
            ExtractOptions(
                images=config.out / split,
                out=cache,
                captions=config.out / f"{split}.csv",
                backbone=config.backbone,
                weights=weights,
                device=config.device,
            )
        )
        yield (
            f"$ cap extract-features --images {config.out / split} "
            f"--captions {config.out / split}.csv --out {cache} "
            f"--backbone {config.backbone} --weights {extraction.weights}"
        )
        for _ in extract(extraction):
            pass
    run = config.out / "run"
    yield (
        f"$ cap train --from-cache {config.out / 'train.h5'} --out {run} --recipe classic "
        f"--epochs {config.epochs} --batch-size {config.batch_size} "
        f"--hidden-size {config.hidden_size} --learning-rate {config.learning_rate} "
        f"--dropout {config.dropout} --select-by loss"
    )
    not_drawn: list[str] = []
    for report in train(
        TrainConfig(
            from_cache=config.out / "train.h5",
            out=run,
            recipe=dataclasses.replace(
                CLASSIC,
                epochs=config.epochs,
                batch_size=config.batch_size,
                hidden_size=config.hidden_size,
                learning_rate=config.learning_rate,
                dropout=config.dropout,
            ),
            select_by="loss",
            device=config.device,
        ),
        notice_of_curves=not_drawn.append,
    ):
        if isinstance(report, EpochLog) and (report.epoch % 5 == 4 or report.epoch == 0):
            yield report.line()
    yield from not_drawn
    yield f"$ cap evaluate --model {run} --cache {config.out / 'test.h5'}"
    evaluation = evaluate(run, config.out / "test.h5", SearchConfig(), device=config.device)
    result = _judge(config, evaluation, truth, started)
    with _writing(config.out):
        (config.out / _MARKER).write_text(json.dumps(result.as_dict(), indent=1) + "\n")
    yield result


def _prepare(out: Path) -> None:
    """Make the folder, or remove from it what an earlier demo made, and mark it as the demo's.

    Raises CapError if it is no folder or holds something else than a demo, and leaves it as it is.
    """
    if out.is_dir():
        if any(out.iterdir()) and not (out / _MARKER).exists():
            raise CapError(f"{out}: holds something else than a demo; name another --out")
    elif os.path.lexists(out):
        kind = "a link that leads nowhere" if out.is_symlink() else "a file"
        raise CapError(f"{out}: is {kind}; name a folder as --out")
    out.mkdir(parents=True, exist_ok=True)
    for name in _MADE:  # not the folder: it may be a link, or the current folder
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (out / _MARKER).write_text("{}\n")


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Raise CapError if the system refuses to write into the folder, as when the disk is full."""
    try:
        yield
    except OSError as error:
        raise CapError(f"{out}: cannot write there ({error.strerror or error})") from None


def _draw(folder: Path, first_seed: int, count: int) -> dict[str, Scene]:
    """Draw scenes into JPEGs beside a Flickr-style captions file. Returns them by file name."""
    folder.mkdir()
    scenes = {}
    with folder.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("image", "caption"))
        for seed in range(first_seed, first_seed + count):
            name = f"scene-{seed:06d}.jpg"
            scenes[name] = draw_scene(seed)
            scenes[name].image.save(folder / name, quality=90)
            table.writerows((name, caption) for caption in scenes[name].captions)
    return scenes


def _judge(
    config: DemoConfig, evaluation: Evaluation, truth: dict[str, Scene], started: float
) -> DemoResult:
    """Count the objects named right, score the control, caption some photo files and draw them."""
    names = list(truth)
    captions = {name: " ".join(evaluation.predictions[name].words) for name in names}
    counts = [named_right(captions[name], truth[name]) for name in names]
    # The control: each scene gets the caption of the scene before it.
    shifted = {name: captions[names[i - 1]] for i, name in enumerate(names)}
    shown = names[:_SHOWN]
    captioner = Captioner.load(config.out / "run", device=config.device)
    predictions = captioner.caption(config.out / "test" / name for name in shown)
    sheet = config.out / _SHEET
    write_sheet(
        [
            Tile(Path(prediction.path), (prediction.caption,), (truth[name].captions[0],))
            for name, prediction in zip(shown, predictions, strict=True)
        ],
        sheet,
        legend="the predicted caption",
        notes_legend="one of the true captions",
        columns=5,
    )
    return DemoResult(
        scores=evaluation.scores,
        control=score(shifted, evaluation.references, meteor=False),
        objects=sum(count[0] for count in counts),
        nouns_right=sum(count[1] for count in counts),
        colors_right=sum(count[2] for count in counts),
        examples=tuple(
            (prediction.path, prediction.caption, truth[name].captions[0])
            for name, prediction in zip(shown[:8], predictions, strict=False)
        ),
        contact_sheet=sheet,
        seconds=time.perf_counter() - started,
    )
