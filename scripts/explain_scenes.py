"""Measure whether `cap explain` finds the shape that a word means, on drawn scenes.

    python scripts/explain_scenes.py --demo demo                # what `cap explain` does
    python scripts/explain_scenes.py --demo demo --compare      # other ways, too

A clear case is a word of the model's caption of which it is known what it means: a noun, or a
colour right before its noun, that the caption has once and that fits one shape of the scene. It is
found if the hottest part of the word's heat has its centre in the square around that shape. By
chance, a part would be there as often as the squares are large; the table says how often.

--demo: the folder of `cap demo`, which runs there first if it has not been run. The scenes are new
ones, that neither the demo's model nor its backbone has seen.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from cache.errors import CapError
from pipeline.captioner.captioner import Captioner
from pipeline.captioner.explanation import GRID, SIDES, Filling, explain, mean_colour
from pipeline.demo.config import DemoConfig
from pipeline.demo.painting import COLORS, HEIGHT, NOUNS, WIDTH, SceneObject
from pipeline.demo.run import run_demo
from pipeline.demo.scenes import Scene, draw_scene
from pipeline.encoder.encoder import load_recorded, normalizer
from pipeline.photos.preprocessing import IMAGENET_MEAN, preprocess_pixels

_FIRST_SEED = 700_000  # the demo trains on 0…, tests on 500,000…, its backbone has seen 1,000,000…
_FALLS_TO_HALF = float(np.log(2))

Heats = list[NDArray[np.float32]]  # (G, G) for each word
Way = Callable[[Captioner, NDArray[np.uint8]], tuple[Sequence[str], Heats]]


@dataclass(frozen=True)
class Case:
    """A word of which it is known what it means, and where its heat says that it is."""

    word: str
    is_color: bool
    shapes: int  # in the scene
    found: bool
    by_chance: float  # share of the parts that would count as found
    hottest: float  # fall of the log-probability in the hottest part


def clear_words(words: Sequence[str], scene: Scene) -> Iterator[tuple[int, SceneObject]]:
    """(place in the caption, the only shape that it can mean) of each clear case."""
    for place, word in enumerate(words):
        if words.count(word) != 1:
            continue
        if word in NOUNS:
            meant = [thing for thing in scene.objects if thing.noun == word]
        elif word in COLORS and (noun := next(iter(words[place + 1 : place + 2]), "")) in NOUNS:
            meant = [thing for thing in scene.objects if thing.color == word]
            if any(thing.noun != noun for thing in meant):
                continue  # the model is wrong about the colour or about the noun
        else:
            continue
        if len(meant) == 1:
            yield place, meant[0]


def is_on(thing: SceneObject, row: float, column: float, grid: int) -> bool:
    """Whether the centre of a part of the grid lies in the square around a shape."""
    x, y = (column + 0.5) / grid * WIDTH, (row + 0.5) / grid * HEIGHT
    return abs(x - thing.x) <= thing.radius and abs(y - thing.y) <= thing.radius


def cases_of(words: Sequence[str], heats: Heats, scene: Scene) -> Iterator[Case]:
    """Whether the heat of each clear word is hottest on its shape."""
    for place, thing in clear_words(words, scene):
        heat = heats[place]
        grid = len(heat)
        row, column = divmod(int(heat.argmax()), grid)
        on_it = sum(is_on(thing, r, c, grid) for r in range(grid) for c in range(grid))
        yield Case(
            word=words[place],
            is_color=words[place] in COLORS,
            shapes=len(scene.objects),
            found=is_on(thing, row, column, grid),
            by_chance=on_it / grid**2,
            hottest=float(heat[row, column]),
        )


def covering(grid: int, sides: Sequence[int], filling: Filling) -> Way:
    """What `cap explain` does, with other settings."""

    def way(captioner: Captioner, photo: NDArray[np.uint8]) -> tuple[Sequence[str], Heats]:
        found = explain(captioner, photo, grid=grid, sides=sides, filling=filling)
        return [word.word for word in found.words], [word.heat for word in found.words]

    return way


def imagenets_gray(pixels: Tensor) -> Tensor:
    """The mean colour of ImageNet, which a network sees as zeros."""
    gray = torch.tensor([round(255 * part) for part in IMAGENET_MEAN], dtype=torch.uint8)
    return gray.view(1, 3, 1, 1).expand_as(pixels)


def blur(side: int) -> Filling:
    """A mean over squares of this many pixels a side, twice."""

    def filling(pixels: Tensor) -> Tensor:
        blurred = pixels.float()
        for _ in range(2):
            blurred = avg_pool2d(pad(blurred, (side // 2,) * 4, mode="replicate"), side, 1)
        return blurred.round().to(torch.uint8)

    return filling


def gradients(grid: int) -> Way:
    """Gradient times input, as far as that differs from the mean colour, summed over each part: by
    how much the log-probability would fall without it, if the network were linear."""

    def way(captioner: Captioner, photo: NDArray[np.uint8]) -> tuple[Sequence[str], Heats]:
        encoder, bundle = captioner.encoder, captioner.bundle
        words = list(captioner.caption(photo)[0].words)
        numbers = torch.tensor([[bundle.vocabulary.number(word) for word in words]])
        network = _plain_network(captioner)
        pixels = preprocess_pixels(photo, encoder.record.image_size)
        normalize = normalizer(torch.device("cpu"), torch.float32, encoder.preprocessing)
        images = normalize(pixels).requires_grad_()
        log_probs = bundle.decoder(network(images), numbers[:, :-1]).log_softmax(2)
        chosen = log_probs.gather(2, numbers[..., None])[0, :, 0]
        differs = images.detach() - normalize(mean_colour(pixels))
        heats = []
        for log_prob in chosen:
            (gradient,) = torch.autograd.grad(log_prob, images, retain_graph=True)
            each = (gradient * differs).sum(1)[None]  # (1, 1, S, S)
            heats.append(torch.nn.functional.adaptive_avg_pool2d(each, grid)[0, 0].numpy())
        return words, heats

    return way


_networks: dict[int, torch.nn.Module] = {}


def _plain_network(captioner: Captioner) -> torch.nn.Module:
    """The backbone as autograd can read it."""
    if id(captioner) not in _networks:
        _networks[id(captioner)] = load_recorded(captioner.encoder.record).network
    return _networks[id(captioner)]


def ways(compare: bool) -> dict[str, Way]:
    """The ways to be measured, by what they are called in the table."""
    usual = {
        f"grid {GRID}, side {_sides(SIDES)} (`cap explain`)": covering(GRID, SIDES, mean_colour)
    }
    if not compare:
        return usual
    fillings = {
        "mean colour": mean_colour,
        "ImageNet's gray": imagenets_gray,
        "blur of 25 pixels": blur(25),
        "blur of 57 pixels": blur(57),
    }
    more: dict[str, Way] = {}
    for name, filling in fillings.items():
        more[f"grid 7, side 2, {name}"] = covering(7, (2,), filling)
    more["grid 7, side 3, ImageNet's gray"] = covering(7, (3,), imagenets_gray)
    grids: list[tuple[int, tuple[int, ...]]] = [
        *((7, (1,)), (7, (1, 2)), (7, (2, 3)), (8, (2,)), (10, (2,)), (10, (3,)), (10, (4,))),
    ]
    for grid, sides in grids:
        more[f"grid {grid}, side {_sides(sides)}"] = covering(grid, sides, mean_colour)
    for grid in (5, 7, 10):
        more[f"gradient × input, grid {grid}"] = gradients(grid)
    return {**usual, **more}


def _sides(sides: Sequence[int]) -> str:
    return " and ".join(map(str, sides))


def table_row(name: str, cases: Sequence[Case], seconds: float) -> str:
    """A row of the table: shares of cases that are found."""

    def share(chosen: Sequence[Case]) -> str:
        return f"{np.mean([case.found for case in chosen]):.1%}" if chosen else "-"

    columns = [
        name,
        f"{len(cases)}",
        share(cases),
        share([case for case in cases if not case.is_color]),
        share([case for case in cases if case.is_color]),
        share([case for case in cases if case.shapes > 1]),
        share([case for case in cases if case.hottest >= _FALLS_TO_HALF]),
        f"{np.mean([case.by_chance for case in cases]):.1%}" if cases else "-",
        f"{seconds:.2f}",
    ]
    return f"| {' | '.join(columns)} |"


def main(
    demo: Annotated[Path, typer.Option(help="Folder of the demo.")] = Path("demo"),
    scenes: Annotated[int, typer.Option(min=1, help="How many to draw.")] = 200,
    first_seed: Annotated[int, typer.Option(help="Of the scenes.")] = _FIRST_SEED,
    compare: Annotated[bool, typer.Option("--compare", help="Measure other ways, too.")] = False,
) -> None:
    """Run the demo if need be, and measure."""
    try:
        if not (demo / "run" / "best.cap").exists():
            for report in run_demo(DemoConfig(out=demo)):
                print(report if isinstance(report, str) else report.summary(), file=sys.stderr)
        captioner = Captioner.load(demo / "run", device="cpu")
        drawn = [draw_scene(seed) for seed in range(first_seed, first_seed + scenes)]
        print(f"{scenes} scenes; cases that are found, of")
        print("| | cases | all | nouns | colours | 2 or 3 shapes | falls to half | chance | s |")
        print("|---|---|---|---|---|---|---|---|---|")
        for name, way in ways(compare).items():
            started = time.perf_counter()
            cases: list[Case] = []
            for scene in drawn:
                words, heats = way(captioner, np.array(scene.image))
                cases += cases_of(words, heats, scene)
            print(table_row(name, cases, (time.perf_counter() - started) / scenes), flush=True)
    except CapError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    typer.run(main)
