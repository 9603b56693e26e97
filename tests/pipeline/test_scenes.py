from __future__ import annotations

import torch
from PIL import ImageChops
from torchvision import models

from pipeline.demo.painting import COLORS, HEIGHT, NOUNS, WIDTH, SceneObject
from pipeline.demo.run import OWN_BACKBONE, OWN_WEIGHTS
from pipeline.demo.scenes import PLACES, Scene, draw_scene, named_right


def test_a_seed_is_a_scene() -> None:
    first, again, other = draw_scene(7), draw_scene(7), draw_scene(8)
    assert ImageChops.difference(first.image, again.image).getbbox() is None
    assert first.captions == again.captions
    assert ImageChops.difference(first.image, other.image).getbbox() is not None
    assert first.image.size == (WIDTH, HEIGHT)


def test_captions_are_five_different_truths() -> None:
    seen: set[str] = set()
    for seed in range(200):
        scene = draw_scene(seed)
        seen.add(scene.layout)
        assert len(set(scene.captions)) == 5
        for caption in scene.captions:
            assert named_right(caption, scene) == (len(scene.objects),) * 3, caption
            assert any(words in caption for words in PLACES[scene.place])
        first, *rest = scene.objects
        for caption in scene.captions:
            if "to the left of" in caption or "between" in caption:
                assert first.x < rest[0].x
            if " above " in caption or " below " in caption:
                assert first.y < rest[0].y
    assert seen == {"one", "side by side", "above", "three"}


def test_objects_are_inside_the_picture_and_in_their_colour() -> None:
    for seed in range(60):
        scene = draw_scene(seed)
        for thing in scene.objects:
            assert 0 < thing.x < WIDTH
            assert 0 < thing.y < HEIGHT
            if thing.noun in ("ball", "star", "fish"):
                spot = scene.image.getpixel((round(thing.x + 0.3 * thing.radius), round(thing.y)))
                assert isinstance(spot, tuple)
                wanted = COLORS[thing.color]
                assert all(abs(a - b) < 60 for a, b in zip(spot, wanted, strict=True)) or (
                    thing.noun == "fish"
                )


def test_counting_names_needs_the_colour_next_to_its_noun() -> None:
    image = draw_scene(0).image
    things = tuple(
        SceneObject(n, c, "small", 0, 0, 1) for n, c in (("ball", "red"), ("car", "blue"))
    )
    scene = Scene(image, (), things, "snow", "side by side")
    assert named_right("a red ball to the left of a blue car.", scene) == (2, 2, 2)
    assert named_right("a blue ball and a red car", scene) == (2, 2, 0)
    assert named_right("a red ball and a red ball", scene) == (2, 1, 1)
    assert named_right("a red boat", scene) == (2, 0, 0)
    assert named_right("", scene) == (2, 0, 0)
    assert set(NOUNS).isdisjoint(COLORS)


def test_the_demos_weights_are_small_and_fit_their_network() -> None:
    assert OWN_WEIGHTS.stat().st_size < 3_000_000
    state = torch.load(OWN_WEIGHTS, weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16, torch.int64}
    network = models.get_model(OWN_BACKBONE, weights=None)
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert missing == ["fc.weight", "fc.bias"]
    assert unexpected == []
