"""`cap compare-encoders`: the same photos, steps and held-out photos for each encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cache.errors import CapError
from cache.store import open_cache
from pipeline.cli.app import app
from pipeline.evaluation import comparison
from pipeline.evaluation.comparison import Compared, Comparison, compare_encoders
from pipeline.evaluation.comparison_config import ComparisonConfig, parse_names
from pipeline.extraction.fill import Progress
from tests.conftest import write_photo
from train.option import SettingError


@pytest.fixture(scope="module")
def many_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    lines = ["image,caption"]
    for number in range(30):
        write_photo(folder / f"{number:02}.jpg", number)
        lines += [f"{number:02}.jpg,a {word} thing" for word in ("red", "small", "round")]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    return folder


def cap(folder: Path, out: Path, backbones: str, *more: object) -> Result:
    arguments: tuple[object, ...] = (
        *("compare-encoders", "--images", folder, "--captions", folder / "captions.txt"),
        *("--out", out, "--image-size", 32, "--steps", 3, "--device", "cpu"),
        *("--backbones", backbones, *more),
    )
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_encoders_are_compared_and_others_added(
    many_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    random = ("--weights", "resnet18=random")
    first = cap(many_photos, out, "resnet18", *random)
    assert first.exit_code == 0, first.stderr
    assert first.stdout.splitlines()[1].startswith("resnet18")
    held_out = (out / "held-out.txt").read_text().split()
    assert len(held_out) == 6  # at most a fifth
    model = json.loads((out / "encoders.json").read_text())["encoders"]["resnet18=random"]
    assert len(model["ciders"]) == 6
    assert model["photos"] == 30
    assert model["train_s"] > 0
    assert model["photos_per_s"] > 0
    assert model["cache_bytes"] == (out / "resnet18_random.h5").stat().st_size

    # The second command compares what is new: it encodes no photo again.
    both = ("squeezenet9,resnet18,mobilenet_v3_small", "--weights", "mobilenet_v3_small=random")
    second = cap(many_photos, out, *both, *random, "--json")
    assert second.exit_code == 1
    assert "resnet18: compared before" in second.stderr
    found = json.loads(second.stdout)
    assert {each["backbone"] for each in found["encoders"]} == {"resnet18", "mobilenet_v3_small"}
    ciders = [each["cider"] for each in found["encoders"]]
    assert ciders == sorted(ciders, reverse=True)
    assert list(found["failed"]) == ["squeezenet9"]
    assert (out / "held-out.txt").read_text().split() == held_out

    other = cap(many_photos, out, "resnet18", *random, "--seed", 1)
    assert other.exit_code == 1
    assert "compares with seed 0, not 1" in other.stderr


def test_an_interrupted_comparison_goes_on(many_photos: Path, tmp_path: Path) -> None:
    config = ComparisonConfig(
        images=many_photos,
        captions=(many_photos / "captions.txt",),
        out=tmp_path,
        backbones=("resnet18",),
        weights=("resnet18=random",),
        image_size=32,
        steps=3,
        device="cpu",
    )
    reports = compare_encoders(config)
    for report in reports:
        if isinstance(report, str) and "training" in report:
            break
    reports.close()  # type: ignore[attr-defined]
    again = list(compare_encoders(config))
    progress = [report for report in again if isinstance(report, Progress)]
    assert progress[-1].new == 0
    result = again[-1]
    assert isinstance(result, Comparison)
    assert result.compared[0].photos_per_s > 0  # of the first command
    assert open_cache(tmp_path / "resnet18_random.h5").encoder.weights == "random"


def test_a_folder_of_something_else_is_left_alone(many_photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    config = ComparisonConfig(images=many_photos, out=tmp_path)
    with pytest.raises(CapError, match="holds something else"):
        list(compare_encoders(config))
    (tmp_path / "encoders.json").write_text("[]")
    with pytest.raises(CapError, match="not the record"):
        list(compare_encoders(config))
    assert (tmp_path / "mine.txt").read_text() == "mine"
    with pytest.raises(CapError, match="cannot write"):
        list(compare_encoders(ComparisonConfig(images=many_photos, out=tmp_path / "mine.txt")))


def compared(name: str, ciders: list[float]) -> Compared:
    return Compared(
        name, "random", 512, 224, sum(ciders) / len(ciders), 0.2, tuple(ciders), 10, 999, 30, 60
    )


def test_what_the_lead_means_is_said_from_the_same_photos() -> None:
    base = [0.1, 0.9, 0.4, 0.6] * 25
    ahead = compared("a", [value + 0.05 + 0.01 * (n % 3) for n, value in enumerate(base)])
    table = Comparison((ahead, compared("b", base)), {"c": "no such thing"}).table()
    assert "a is ahead of b by 6.0 ± 0.1 CIDEr" in table
    assert "more than chance" in table
    assert table.endswith("c: no such thing")
    other = compared("d", [*base[1:], base[0] - 0.1])
    assert "may be chance" in Comparison((compared("b", base), other), {}).table()


@pytest.mark.parametrize(
    ("photos", "expected"), [(2, 1), (30, 6), (1000, 100), (5000, 500), (80_000, 1000)]
)
def test_a_sensible_number_of_photos_is_held_out(photos: int, expected: int) -> None:
    assert comparison._held_out_count(photos) == expected


def test_settings_are_checked() -> None:
    assert parse_names("a, timm:b") == ("a", "timm:b")
    for wrong in ("", "a,,b", "a,a"):
        with pytest.raises(ValueError, match="names of backbones"):
            parse_names(wrong)
    for weights in ("resnet50", "resnet50=", "alexnet=random"):
        with pytest.raises(SettingError, match="--weights"):
            ComparisonConfig(images=Path(), backbones=("resnet50",), weights=(weights,))
