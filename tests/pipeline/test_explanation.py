"""`cap explain` says which parts of a photo a word depends on: in a made-up model whose word
depends on one quadrant, in a trained one, and on drawn scenes.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner, Result

from cache.store import FeatureCache
from pipeline.captioner.captioner import Captioner
from pipeline.captioner.explanation import (
    GRID,
    SIDES,
    Explanation,
    ExplanationError,
    Frame,
    chosen_words,
    covering_squares,
    explain,
    spread,
)
from pipeline.captioner.photo_search import PhotoSearchError
from pipeline.captioner.predictions import Prediction, prediction_of
from pipeline.cli.app import app
from pipeline.cli.models.explain import _GRID
from pipeline.demo.painting import HEIGHT, WIDTH, SceneObject
from pipeline.demo.run import OWN_BACKBONE, OWN_WEIGHTS
from pipeline.demo.scenes import Scene, draw_scene
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import extract
from pipeline.gallery.explanation import _coloured, draw_explanation, scale_of
from pipeline.photos.preprocessing import Preprocessing, preprocess_pixels
from tests.conftest import ROOT
from tests.pipeline.test_captioner import trained
from train.captions.vocabulary import Vocabulary
from train.config import Recipe, TrainConfig
from train.fit.run import train
from train.search.hypotheses import Hypothesis

SIZE = 32
WORDS = Vocabulary(("a", "dog", "."), (3, 2, 1), 1)


class MadeUp:
    """A captioner that says «a dog.», and is the surer of «dog» the more red the top left quadrant
    of the photo is, in whatever view."""

    def __init__(self, *views: str) -> None:
        self.views = views or ("full",)
        self.bundle = SimpleNamespace(vocabulary=WORDS)
        self.encoder = SimpleNamespace(
            record=SimpleNamespace(image_size=SIZE), preprocessing=Preprocessing()
        )
        self.seen: list[Tensor] = []

    def caption(self, photo: object) -> list[Prediction]:
        said = tuple(WORDS.number(word) for word in ("a", "dog", "."))
        return [prediction_of("x", WORDS, [Hypothesis(said, -1.0, (-1.0,) * 4)], 1)]

    def word_log_probs(self, pixels: Tensor, words: Sequence[int]) -> Tensor:
        self.seen.append(pixels.clone())
        found = torch.full((len(pixels), len(words)), -0.5)
        half = SIZE // 2
        red = torch.zeros(len(pixels))
        for view, name in enumerate(self.views):
            columns = slice(half, None) if name == "flip" else slice(half)
            red += pixels[:, view, 0, :half, columns].float().mean((1, 2)) / 255
        found[:, list(words).index(WORDS.number("dog"))] = red / len(self.views) - 1
        return found

    def cast(self) -> Captioner:
        return cast(Captioner, self)


def red_quadrant(height: int = 48, width: int = 64) -> np.ndarray[Any, np.dtype[np.uint8]]:
    photo = np.zeros((height, width, 3), np.uint8)
    photo[: height // 2, : width // 2, 0] = 255
    return photo


@pytest.mark.parametrize("views", [("full",), ("flip",), ("full", "flip")])
def test_a_word_that_depends_on_one_quadrant_is_hot_there_alone(views: tuple[str, ...]) -> None:
    found = explain(MadeUp(*views).cast(), red_quadrant(), grid=8, sides=(1, 2))
    assert [word.word for word in found.words] == ["a", "dog", "."]
    assert [word.text for word in found.words] == ["A", "dog", "."]
    article, dog, mark = found.words
    assert dog.heat[:4, :4].min() > 0.01
    assert np.abs(dog.heat[5:]).max() < 1e-6  # a square of two parts may reach one part further
    assert np.abs(dog.heat[:, 5:]).max() < 1e-6
    assert dog.heat[1:3, 1:3].min() > dog.heat[4].max()
    top, bottom, left, right = dog.worst
    assert (top >= 0, bottom <= 4, left >= 0, right <= 4) == (True,) * 4
    assert dog.worst_log_prob < dog.log_prob == pytest.approx(0, abs=0.05)
    assert not article.heat.any()  # exactly
    assert mark.is_mark
    assert not dog.is_mark


def test_a_part_that_speaks_against_a_word_is_below_zero() -> None:
    photo = np.full((SIZE, SIZE, 3), 255, np.uint8)
    photo[: SIZE // 2, : SIZE // 2] = 0  # covered by the mean colour, it gets redder
    dog = explain(MadeUp().cast(), photo, grid=4, sides=(2,)).words[1]
    assert dog.heat[0, 0] < -0.05
    assert dog.heat.max() <= 1e-6


def test_every_part_is_covered_equally_often() -> None:
    squares = covering_squares(5, (2, 3))
    times = np.zeros((5, 5), int)
    for top, bottom, left, right in squares:
        times[max(0, top) : bottom, max(0, left) : right] += 1
    assert (times == 2 * 2 + 3 * 3).all()
    assert len(set(squares)) == len(squares) == 6**2 + 7**2


def test_the_heat_is_the_mean_over_the_squares() -> None:
    squares = [(0, 1, 0, 2), (0, 2, 0, 1), (1, 3, 1, 3)]  # the last one sticks out
    heat = spread(np.array([[4.0], [2.0], [8.0]], np.float32), squares, 2)[:, :, 0]
    assert heat.tolist() == [[3.0, 4.0], [2.0, 8.0]]


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (2048, 32)])
@pytest.mark.parametrize("view", ["full", "flip", "center", "top-left", "bottom-right"])
def test_covering_a_view_is_as_covering_the_photo(view: str, shape: tuple[int, int]) -> None:
    height, width = shape
    grid, square = 4, (1, 3, 2, 3)
    photo = np.full((height, width, 3), 255, np.uint8)
    photo[height // 4 : 3 * height // 4, width // 2 : 3 * width // 4] = 0
    (expected,) = preprocess_pixels(photo, SIZE, (view,))[:, 0].numpy()
    covered = np.full((SIZE, SIZE), 255, np.uint8)
    covered[Frame.of(view, height, width, SIZE).pixels(square, grid)] = 0
    # The filter mixes pixels on the edges of the square.
    assert (np.abs(covered.astype(int) - expected) > 127).mean() < 0.05
    if view in ("full", "flip"):
        assert not covered.all()


def test_covered_pixels_have_the_mean_colour_and_others_stay() -> None:
    model = MadeUp()
    photo = red_quadrant()
    explain(model.cast(), photo, grid=4, sides=(1,))
    whole, covered = model.seen[0][0, 0], model.seen[1][:, 0]
    assert len(covered) == 16
    for place, each in enumerate(covered):
        row, column = divmod(place, 4)
        part = slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)
        mean = whole.float().mean((1, 2)).round()
        assert (each[:, *part] == mean[:, None, None]).all()
        each[:, *part] = whole[:, *part]
        assert torch.equal(each, whole)


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureCache, Path]:
    return trained(photos, tmp_path_factory.mktemp("explanation"), views=("full", "flip"))


@pytest.fixture(scope="module")
def captioner(run: tuple[FeatureCache, Path]) -> Captioner:
    return Captioner.load(run[1], device="cpu")


def photo_of(photos: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(Image.open(photos / "a.jpg").convert("RGB"))


def test_the_probabilities_are_those_of_the_prediction(photos: Path, captioner: Captioner) -> None:
    photo = photo_of(photos)
    (prediction,) = captioner.caption(photo)
    reports: list[tuple[int, int]] = []
    found = explain(captioner, photo, grid=3, report=lambda *each: reports.append(each))
    assert found.caption == prediction.caption
    assert tuple(word.word for word in found.words) == prediction.words
    log_probs = prediction.captions[0].log_probs
    for word, log_prob in zip(found.words, log_probs, strict=False):
        assert word.log_prob == pytest.approx(log_prob, abs=1e-3)
        assert word.heat.shape == (3, 3)
        assert word.worst_log_prob <= word.log_prob - word.heat.max() + 1e-5
    assert any(np.abs(word.heat).max() > 1e-4 for word in found.words)
    assert reports[-1] == (found.squares, found.squares) == (5 * 5,) * 2
    again = explain(captioner, photo, grid=3, caption=f"xyzzy {prediction.caption}")
    assert again.unknown == ("xyzzy",)
    for word, other in zip(found.words, again.words, strict=True):
        assert word.word == other.word
        assert np.allclose(word.heat, other.heat, atol=1e-5)
    with pytest.raises(PhotoSearchError, match="knows no word"):
        explain(captioner, photo, caption="xyzzy")


def test_probabilities_that_are_not_finite_are_one_line() -> None:
    class Broken(MadeUp):
        def word_log_probs(self, pixels: Tensor, words: Sequence[int]) -> Tensor:
            return super().word_log_probs(pixels, words) * torch.nan

    with pytest.raises(ExplanationError, match="not finite"):
        explain(Broken().cast(), red_quadrant(), grid=3)


def test_words_are_chosen_as_they_are_known_or_written() -> None:
    found = explain(MadeUp().cast(), red_quadrant(), grid=3)
    assert [word.word for word in chosen_words(found, None)] == ["a", "dog"]
    assert [word.word for word in chosen_words(found, " DOG, A,,")] == ["a", "dog"]
    assert [word.word for word in chosen_words(found, ".")] == ["."]
    for wrong in ("cat", "dog,cat", ",", "do"):
        with pytest.raises(ExplanationError, match="A dog"):
            chosen_words(found, wrong)


def pixels_of(picture: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(Image.open(picture).convert("RGB"))


def test_only_what_a_word_depends_on_has_colour(tmp_path: Path) -> None:
    grey = Image.new("L", (80, 60), 200)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0], heat[3, 3] = 1, -1
    drawn = _coloured(grey, heat).astype(int)
    saturation = drawn.max(2) - drawn.min(2)
    assert saturation[5, 5] > 100
    assert not saturation[40:].any()
    assert len(np.unique(drawn[40:])) == 1
    # Words share a scale, and it has a smallest value.
    found = explain(MadeUp().cast(), red_quadrant(), grid=4)
    assert scale_of(found.words) == max(math.log(2), float(found.words[1].heat.max()))
    assert scale_of(found.words[:1]) == math.log(2)
    draw_explanation(found, found.words[:2], red_quadrant(), tmp_path / "x.png")
    draw_explanation(found, found.words[:1], red_quadrant(), tmp_path / "article.png")
    both, article = pixels_of(tmp_path / "x.png"), pixels_of(tmp_path / "article.png")
    assert both.shape == article.shape
    tiles = [pixels[-100:].astype(int) for pixels in (both, article)]  # the bottoms of the tiles
    assert tiles[0].std() > tiles[1].std() > 1


@pytest.mark.parametrize("shape", [(10, 3000), (3000, 10), (1, 1), (600, 400)])
def test_photos_of_any_shape_are_drawn(shape: tuple[int, int], tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    found = explain(MadeUp().cast(), photo, grid=3)
    odd = Explanation("$x$ \n" + "word " * 80, found.words, 3, found.squares)
    draw_explanation(odd, found.words, photo, tmp_path / "x.png")
    height, width, _ = pixels_of(tmp_path / "x.png").shape
    assert width == 1200
    assert 300 < height < 900


def cap(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["explain", *map(str, arguments)])


def test_the_command(
    photos: Path,
    run: tuple[FeatureCache, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    common = (photos / "a.jpg", "--model", run[1], "--grid", 3, "--device", "cpu")
    said = cap(*common)
    assert (said.exit_code, said.stdout) == (0, "a-explained.png\n")
    first = pixels_of(Path("a-explained.png"))
    answer = json.loads(cap(*common, "--json").stdout)  # replaces its own picture
    assert answer["picture"] == "a-explained.png"
    assert (answer["grid"], answer["squares"], answer["unknown"]) == (3, 25, [])
    assert answer["caption"] in said.stderr
    assert all(np.shape(word["falls"]) == (3, 3) for word in answer["words"])
    word = answer["words"][0]["word"]
    one = cap(*common, "--words", word, "--caption", f"xyzzy {word}", "--out", "new/one.png")
    assert one.exit_code == 0, one.output
    assert "does not know it: xyzzy" in one.stderr
    assert pixels_of(Path("new/one.png")).shape[0] <= first.shape[0]
    assert "is no word of the caption" in cap(*common, "--words", "xyzzy").stderr


def test_no_file_of_the_users_is_replaced(
    photos: Path, run: tuple[FeatureCache, Path], tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs.png"
    Image.new("RGB", (8, 8)).save(theirs)
    before = theirs.read_bytes()
    link = tmp_path / "link.png"
    link.symlink_to(theirs)
    common = ("--model", run[1], "--grid", 3)
    for photo, out, problem in (
        (photos / "a.jpg", theirs, "is no picture that `cap explain` has drawn"),
        (photos / "a.jpg", link, "is no picture that `cap explain` has drawn"),
        (theirs, theirs, "is the photo itself"),
        (photos / "a.jpg", tmp_path / "x.jpg", "pictures are PNG"),
        (photos / "e.jpg", tmp_path / "x.png", "e.jpg: not an image"),
        (tmp_path / "gone.jpg", tmp_path / "x.png", "gone.jpg: file not found"),
        (photos, tmp_path / "x.png", "is a folder, not a photo"),
    ):
        said = cap(photo, "--out", out, *common)
        assert said.exit_code == 1
        assert problem in said.stderr
        assert len(said.stderr.splitlines()) == 1
    assert theirs.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"theirs.png", "link.png"}


def test_the_help_says_what_the_default_is() -> None:
    assert (GRID, SIDES) == (_GRID, (3,))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = ROOT / "scripts" / "explain_scenes.py"
    spec = importlib.util.spec_from_file_location("explain_scenes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "explain_scenes", module)
    spec.loader.exec_module(module)
    return module


def test_the_covered_shape_is_the_one_that_the_word_names(
    script: ModuleType, tmp_path: Path
) -> None:
    """On few scenes, with a decoder of seconds, which knows true captions better than it writes
    them. docs/explain.md has 200 scenes with the demo's.
    """
    folder = tmp_path / "train"
    folder.mkdir()
    lines = ["image,caption"]
    for seed in range(120):
        scene = draw_scene(seed)
        scene.image.save(folder / f"{seed}.jpg")
        lines.append(f'{seed}.jpg,"{scene.captions[0]}"')
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    cache = tmp_path / "train.h5"
    for _ in extract(
        ExtractConfig(
            images=folder,
            out=cache,
            captions=tmp_path / "train.csv",
            backbone=OWN_BACKBONE,
            weights=str(OWN_WEIGHTS),
            device="cpu",
        )
    ):
        pass
    recipe = Recipe(
        epochs=20, batch_size=16, embedding_size=64, hidden_size=96, learning_rate=0.006
    )
    for _ in train(
        TrainConfig(
            from_cache=cache,
            out=tmp_path / "run",
            recipe=recipe,
            val_share=0.05,
            select_by="loss",
            device="cpu",
        )
    ):
        pass
    captioner = Captioner.load(tmp_path / "run", device="cpu")
    cases = []
    for seed in range(800_000, 800_007):
        scene = draw_scene(seed)
        found = explain(captioner, np.array(scene.image), caption=scene.captions[0], grid=6)
        words = [word.word for word in found.words]
        cases += script.cases_of(words, [word.heat for word in found.words], scene)
    assert len(cases) >= 15
    share = np.mean([case.found for case in cases])
    assert share >= 0.6
    assert share > 4 * np.mean([case.by_chance for case in cases])
    sure = [case.found for case in cases if case.hottest >= math.log(2)]
    assert len(sure) >= 3
    assert np.mean(sure) >= 0.8


def test_a_clear_case_has_one_meaning(script: ModuleType) -> None:
    things = tuple(
        SceneObject(noun, color, "small", x, 100, 20)
        for noun, color, x in (("ball", "red", 40), ("car", "red", 160), ("tree", "blue", 280))
    )
    scene = Scene(Image.new("RGB", (WIDTH, HEIGHT)), (), things, "snow", "three")

    def clear(caption: str) -> list[tuple[str, str]]:
        words = caption.split()
        return [(words[at], thing.noun) for at, thing in script.clear_words(words, scene)]

    assert clear("a red ball and a blue tree") == [
        *(("ball", "ball"), ("blue", "tree"), ("tree", "tree"))
    ]  # two things are red
    assert clear("a blue ball") == [("ball", "ball")]  # which is not blue
    assert clear("a tree beside a tree under a blue sky") == []
    heat = np.zeros((8, 8), np.float32)
    heat[3, 1] = 1  # its centre is (60, 105)
    (case,) = script.cases_of(["ball"], [heat], scene)
    assert (case.found, case.by_chance, case.shapes) == (True, 2 / 64, 3)
    (case,) = script.cases_of(["car"], [heat], scene)
    assert not case.found
