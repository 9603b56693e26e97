"""Drawn scenes with true captions: the photos of the demo. The same seed gives the same scene.

A scene has one to three objects (noun, colour, size) in a place, side by side or one above the
other. Its five captions describe this in different words. They name objects from left to right or
from top to bottom, as people do.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image

from pipeline.demo.painting import COLORS, HEIGHT, NOUNS, WIDTH, SceneObject, paint

# The places with the words for them, the most usual words first.
PLACES: dict[str, tuple[str, ...]] = {
    "meadow": ("in a green meadow", "on the grass"),
    "beach": ("on the beach", "on a sandy beach"),
    "snow": ("in the snow", "on a snowy field"),
    "street": ("on a city street", "on the road"),
    "night": ("under the night sky", "at night"),
}
LAYOUTS = ("one", "side by side", "above", "three")


@dataclass(frozen=True)
class Scene:
    """A picture and what it shows. The objects are in the order in which captions name them."""

    image: Image.Image
    captions: tuple[str, ...]  # five
    objects: tuple[SceneObject, ...]
    place: str
    layout: str


def draw_scene(seed: int) -> Scene:
    """The scene of a seed, with an RGB picture of WIDTH x HEIGHT pixels."""
    chance = random.Random(seed)
    layout = chance.choices(LAYOUTS, weights=(2, 4, 2, 2))[0]
    place = chance.choice(tuple(PLACES))
    objects = _place_objects(chance, layout)
    image = paint(place, objects, chance)
    return Scene(image, _captions(chance, objects, place, layout), objects, place, layout)


def named_right(caption: str, scene: Scene) -> tuple[int, int, int]:
    """How many objects (the scene has, the caption names, it names with the right colour).

    A colour belongs to the noun right after it. Each mention counts for one object.
    """
    words = caption.lower().replace(".", " ").replace(",", " ").split()
    nouns = Counter(word for word in words if word in NOUNS)
    pairs = Counter(pairwise(words))
    wanted_nouns = Counter(thing.noun for thing in scene.objects)
    wanted_pairs = Counter((thing.color, thing.noun) for thing in scene.objects)
    return (
        len(scene.objects),
        (nouns & wanted_nouns).total(),
        (pairs & wanted_pairs).total(),
    )


def _place_objects(chance: random.Random, layout: str) -> tuple[SceneObject, ...]:
    count = {"one": 1, "side by side": 2, "above": 2, "three": 3}[layout]
    nouns = chance.sample(NOUNS, count)
    objects = []
    for i, noun in enumerate(nouns):
        size = chance.choice(("small", "large"))
        radius = HEIGHT * (0.12 if size == "small" else 0.21) * chance.uniform(0.93, 1.07)
        if layout == "three":
            radius *= 0.85
        if layout == "above":
            x, y = chance.uniform(0.35, 0.65), (0.27, 0.75)[i] + chance.uniform(-0.03, 0.03)
        else:
            x = {
                1: (chance.uniform(0.3, 0.7),),
                2: (chance.uniform(0.2, 0.3), chance.uniform(0.7, 0.8)),
                3: (
                    chance.uniform(0.14, 0.2),
                    chance.uniform(0.47, 0.53),
                    chance.uniform(0.8, 0.86),
                ),
            }[count][i]
            y = chance.uniform(0.45, 0.7)
        color = chance.choice(tuple(COLORS))
        objects.append(SceneObject(noun, color, size, x * WIDTH, y * HEIGHT, radius))
    return tuple(objects)


def _captions(
    chance: random.Random, objects: tuple[SceneObject, ...], place: str, layout: str
) -> tuple[str, ...]:
    """Two captions in the wordings that every scene has, and three in others."""
    usual, other = PLACES[place][0], PLACES[place][1]
    where = chance.choice((usual, other))
    plain = [f"a {thing.color} {thing.noun}" for thing in objects]
    sized = [f"a {thing.size} {thing.color} {thing.noun}" for thing in objects]
    if layout == "one":
        always = [f"{plain[0]} {usual}.", f"{sized[0]} {usual}."]
        others = [
            f"there is {plain[0]} {where}.",
            f"a picture of {sized[0]} {where}.",
            f"{plain[0]} all alone {where}.",
            f"{where}, there is {sized[0]}.",
            f"one {objects[0].color} {objects[0].noun} {where}.",
        ]
    elif layout == "three":
        rest = f"{plain[1]} and {plain[2]}"
        always = [
            f"{plain[0]}, {rest} {usual}.",
            f"{plain[1]} between {plain[0]} and {plain[2]} {usual}.",
        ]
        others = [
            f"there are {plain[0]}, {rest} {where}.",
            f"three things {where}: {plain[0]}, {rest}.",
            f"{sized[0]}, {rest} {where}.",
            f"{where}, {plain[0]} stands beside {rest}.",
            f"{plain[0]} next to {rest} {where}.",
        ]
    else:
        relation = "to the left of" if layout == "side by side" else "above"
        inverse = "to the right of" if layout == "side by side" else "below"
        always = [
            f"{plain[0]} {relation} {plain[1]} {usual}.",
            f"{sized[0]} {relation} {sized[1]} {usual}.",
        ]
        others = [
            f"{plain[0]} and {plain[1]} {where}.",
            f"there is {plain[0]} {relation} {plain[1]} {where}.",
            f"{sized[1]} {inverse} {plain[0]} {where}.",
            f"{where}, {plain[0]} is {relation} {sized[1]}.",
            f"two things {where}: {plain[0]} and {plain[1]}.",
        ]
    return tuple(always + chance.sample(others, 3))
