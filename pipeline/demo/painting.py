"""Painting scenes: places as backgrounds, and objects in front of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

WIDTH, HEIGHT = 320, 240  # pixels
_SUPERSAMPLING = 2

Color = tuple[int, int, int]
COLORS: dict[str, Color] = {
    "red": (214, 40, 40),
    "yellow": (250, 208, 44),
    "green": (34, 139, 60),
    "blue": (38, 84, 208),
    "purple": (140, 60, 170),
    "white": (246, 246, 246),
}
# The objects that can be painted.
NOUNS = ("ball", "house", "tree", "car", "boat", "star", "kite", "fish")
_OUTLINE = (40, 36, 48)


@dataclass(frozen=True)
class SceneObject:
    """One object. x and y are its centre and radius is half its size, in pixels."""

    noun: str  # of NOUNS
    color: str  # of COLORS
    size: str  # small or large
    x: float
    y: float
    radius: float


def paint(place: str, objects: tuple[SceneObject, ...], chance: random.Random) -> Image.Image:
    """An RGB picture of WIDTH x HEIGHT pixels. Objects further down cover those above them."""
    canvas = Image.new("RGB", (_W, _H))
    draw = ImageDraw.Draw(canvas)
    _PLACE_PAINTERS[place](draw, chance)
    for thing in sorted(objects, key=lambda thing: thing.y):
        _draw_object(draw, thing, chance)
    return canvas.resize((WIDTH, HEIGHT), Image.Resampling.BOX)


# All coordinates below are in supersampled pixels.
_W, _H = WIDTH * _SUPERSAMPLING, HEIGHT * _SUPERSAMPLING


def _shade(color: Color, chance: random.Random, spread: int = 14) -> Color:
    shift = chance.randint(-spread, spread)
    red, green, blue = (
        max(0, min(255, part + shift + chance.randint(-spread // 2, spread // 2))) for part in color
    )
    return red, green, blue


def _gradient(draw: ImageDraw.ImageDraw, top: Color, bottom: Color, start: int, stop: int) -> None:
    for y in range(start, stop):
        part = (y - start) / max(1, stop - start - 1)
        mixed = [round(a + (b - a) * part) for a, b in zip(top, bottom, strict=True)]
        draw.line((0, y, _W, y), fill=(mixed[0], mixed[1], mixed[2]))


def _clouds(draw: ImageDraw.ImageDraw, chance: random.Random, color: Color) -> None:
    for _ in range(chance.randint(1, 3)):
        x, y = chance.uniform(0, _W), chance.uniform(0.04, 0.2) * _H
        for _ in range(4):
            dx, dy = chance.uniform(-40, 40), chance.uniform(-8, 8)
            draw.ellipse((x + dx - 34, y + dy - 14, x + dx + 34, y + dy + 14), fill=color)


def _horizon(chance: random.Random) -> int:
    return round(chance.uniform(0.36, 0.46) * _H)


def _meadow(draw: ImageDraw.ImageDraw, chance: random.Random) -> None:
    horizon = _horizon(chance)
    _gradient(draw, _shade((120, 180, 235), chance), (200, 225, 245), 0, horizon)
    _clouds(draw, chance, (250, 250, 252))
    _gradient(draw, _shade((140, 200, 90), chance), _shade((110, 178, 70), chance), horizon, _H)
    for _ in range(70):
        x, y = chance.uniform(0, _W), chance.uniform(horizon, _H)
        draw.line((x, y, x + chance.uniform(-4, 4), y - 12), fill=(84, 150, 56), width=2)


def _beach(draw: ImageDraw.ImageDraw, chance: random.Random) -> None:
    horizon = _horizon(chance)
    sea = horizon + round(chance.uniform(0.08, 0.14) * _H)
    _gradient(draw, _shade((110, 190, 240), chance), (215, 235, 245), 0, horizon)
    _gradient(draw, _shade((40, 130, 180), chance), (90, 190, 205), horizon, sea)
    _gradient(draw, _shade((238, 214, 160), chance), _shade((226, 196, 140), chance), sea, _H)
    for _ in range(6):
        x, y = chance.uniform(0, _W), chance.uniform(horizon + 6, sea - 4)
        draw.line((x, y, x + 50, y), fill=(210, 235, 240), width=3)
    for _ in range(60):
        x, y = chance.uniform(0, _W), chance.uniform(sea, _H)
        draw.ellipse((x, y, x + 4, y + 3), fill=(206, 176, 120))


def _snow(draw: ImageDraw.ImageDraw, chance: random.Random) -> None:
    horizon = _horizon(chance)
    _gradient(draw, _shade((168, 184, 204), chance), (214, 222, 232), 0, horizon)
    _gradient(draw, _shade((226, 232, 240), chance, 6), (236, 240, 246), horizon, _H)
    for _ in range(90):
        x, y = chance.uniform(0, _W), chance.uniform(0, _H)
        draw.ellipse((x, y, x + 6, y + 6), fill=(255, 255, 255))


def _street(draw: ImageDraw.ImageDraw, chance: random.Random) -> None:
    horizon = _horizon(chance)
    _gradient(draw, _shade((176, 190, 204), chance), (206, 210, 214), 0, horizon)
    x = chance.uniform(-40, 0)
    while x < _W:
        width, top = chance.uniform(50, 100), chance.uniform(0.06, 0.26) * _H
        draw.rectangle((x, top, x + width, horizon), fill=_shade((150, 140, 132), chance, 24))
        for row in range(int(top) + 10, horizon - 14, 26):
            for column in range(int(x) + 8, int(x + width) - 14, 22):
                draw.rectangle((column, row, column + 9, row + 12), fill=(104, 112, 122))
        x += width + chance.uniform(2, 12)
    _gradient(draw, _shade((112, 112, 116), chance), _shade((92, 92, 96), chance), horizon, _H)
    middle = round(chance.uniform(0.84, 0.92) * _H)
    for x in range(chance.randint(-60, 0), _W, 90):
        draw.rectangle((x, middle, x + 50, middle + 7), fill=(226, 222, 190))


def _night(draw: ImageDraw.ImageDraw, chance: random.Random) -> None:
    horizon = round(chance.uniform(0.8, 0.88) * _H)
    _gradient(draw, _shade((12, 16, 46), chance, 6), _shade((40, 46, 92), chance, 8), 0, horizon)
    _gradient(draw, (26, 30, 40), (18, 20, 28), horizon, _H)
    for _ in range(60):
        x, y = chance.uniform(0, _W), chance.uniform(0, horizon)
        draw.ellipse((x, y, x + 3, y + 3), fill=(226, 226, 240))
    x, y = chance.uniform(0.05, 0.95) * _W, chance.uniform(0.06, 0.12) * _H
    draw.ellipse((x - 20, y - 20, x + 20, y + 20), fill=(236, 236, 214))


_PLACE_PAINTERS: dict[str, Callable[[ImageDraw.ImageDraw, random.Random], None]] = {
    "meadow": _meadow,
    "beach": _beach,
    "snow": _snow,
    "street": _street,
    "night": _night,
}


def _draw_object(draw: ImageDraw.ImageDraw, thing: SceneObject, chance: random.Random) -> None:
    """Paint one object. Its shape is given relative to its centre, in units of its radius."""
    fill = _shade(COLORS[thing.color], chance, 8)
    dark = (fill[0] * 2 // 3, fill[1] * 2 // 3, fill[2] * 2 // 3)
    cx, cy = thing.x * _SUPERSAMPLING, thing.y * _SUPERSAMPLING
    scale = thing.radius * _SUPERSAMPLING
    line = max(3, round(scale * 0.05))

    def at(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [(cx + x * scale, cy + y * scale) for x, y in points]

    def polygon(*points: tuple[float, float], color: Color = fill) -> None:
        draw.polygon(at(*points), fill=color, outline=_OUTLINE, width=line)

    def ellipse(x: float, y: float, rx: float, ry: float, color: Color = fill) -> None:
        (left, top), (right, bottom) = at((x - rx, y - ry), (x + rx, y + ry))
        draw.ellipse((left, top, right, bottom), fill=color, outline=_OUTLINE, width=line)

    match thing.noun:
        case "ball":
            ellipse(0, 0, 0.85, 0.85)
            (left, top), (right, bottom) = at((-0.85, -0.35), (0.85, 0.35))
            draw.arc((left, top, right, bottom), 0, 180, fill=_OUTLINE, width=line)
            ellipse(-0.32, -0.4, 0.16, 0.12, (255, 255, 255))
        case "house":
            polygon((-0.75, -0.15), (0.75, -0.15), (0.75, 0.9), (-0.75, 0.9))
            polygon((-0.95, -0.15), (0, -0.95), (0.95, -0.15), color=dark)
            polygon((-0.18, 0.9), (-0.18, 0.3), (0.18, 0.3), (0.18, 0.9), color=(110, 76, 50))
            for x in (-0.5, 0.5):
                polygon(
                    (x - 0.15, 0.05), (x + 0.15, 0.05), (x + 0.15, 0.32), (x - 0.15, 0.32),
                    color=(190, 224, 240),
                )  # fmt: skip
        case "tree":
            polygon((-0.14, 0.95), (-0.14, 0.1), (0.14, 0.1), (0.14, 0.95), color=(120, 82, 50))
            for x, y in ((-0.4, 0.0), (0.4, 0.0), (0, -0.45), (0, -0.05)):
                ellipse(x, y, 0.48, 0.46)
        case "car":
            polygon((-0.5, -0.1), (-0.3, -0.55), (0.35, -0.55), (0.6, -0.1), color=(190, 224, 240))
            polygon((-1, -0.1), (0.9, -0.1), (1, 0.15), (1, 0.4), (-1, 0.4))
            for x in (-0.55, 0.55):
                ellipse(x, 0.42, 0.25, 0.25, (50, 50, 54))
                ellipse(x, 0.42, 0.1, 0.1, (200, 200, 204))
        case "boat":
            polygon((-0.95, 0.3), (0.95, 0.3), (0.55, 0.8), (-0.55, 0.8), color=(120, 82, 50))
            polygon((-0.05, 0.2), (-0.05, -0.95), (0.8, 0.2))
            polygon((-0.15, 0.2), (-0.15, -0.7), (-0.7, 0.2))
        case "star":
            points = []
            for i in range(10):
                reach = 1.0 if i % 2 == 0 else 0.42
                angle = math.pi * i / 5 - math.pi / 2
                points.append((reach * math.cos(angle), reach * math.sin(angle)))
            polygon(*points)
        case "kite":
            polygon((0, -0.95), (0.62, -0.25), (0, 0.55), (-0.62, -0.25))
            draw.line(at((0, -0.95), (0, 0.55)), fill=_OUTLINE, width=line)
            draw.line(at((-0.62, -0.25), (0.62, -0.25)), fill=_OUTLINE, width=line)
            tail = [(0.12 * math.sin(i * 1.3), 0.55 + i * 0.06) for i in range(8)]
            draw.line(at(*tail), fill=_OUTLINE, width=line)
            for i in (3, 6):
                ellipse(tail[i][0], tail[i][1], 0.12, 0.06)
        case "fish":
            polygon((0.45, 0), (1, -0.45), (0.9, 0), (1, 0.45), color=dark)
            ellipse(-0.15, 0, 0.78, 0.5)
            polygon((-0.2, -0.1), (0.2, 0.05), (-0.2, 0.2), color=dark)
            ellipse(-0.58, -0.12, 0.1, 0.1, (255, 255, 255))
            ellipse(-0.58, -0.12, 0.04, 0.04, _OUTLINE)
