import json
from pathlib import Path

import pytest
from PIL import Image

from cache.errors import CapError
from pipeline.demo.config import DemoConfig
from pipeline.demo.run import DemoResult, run_demo
from pipeline.photos.decoding import decode


@pytest.mark.usefixtures("small_meteor")
def test_a_small_demo_goes_all_the_way_and_may_be_repeated(tmp_path: Path) -> None:
    config = DemoConfig(
        out=tmp_path / "demo", train_scenes=24, test_scenes=6, epochs=1, hidden_size=16
    )
    for _ in range(2):
        *said, result = run_demo(config)
        assert isinstance(result, DemoResult)
        assert any("trained on other drawn scenes" in str(line) for line in said)
        assert sum(str(line).startswith("$ cap ") for line in said) == 4
        assert result.scores.count == result.control.count == 6
        assert 6 <= result.objects <= 18
        assert result.colors_right <= result.nouns_right <= result.objects
        assert all(caption in result.summary() for _, caption, _ in result.examples)
        assert decode(result.contact_sheet.read_bytes()).std() > 20
        assert json.loads((tmp_path / "demo/cap-demo.json").read_text()) == result.as_dict()


@pytest.mark.parametrize("out", ["demo", "link", "."])
def test_a_second_demo_replaces_the_first_and_nothing_else(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path if out == "." else tmp_path / "demo"
    folder.mkdir(exist_ok=True)
    if out == "link":
        (tmp_path / "link").symlink_to("demo")
    monkeypatch.chdir(tmp_path)
    config = DemoConfig(out=Path(out), train_scenes=2, test_scenes=2)
    for _ in range(2):
        demo = run_demo(config)
        while "drew 2 scenes into" not in str(next(demo)):
            pass
        (folder / "test").mkdir(exist_ok=True)
        (folder / "train/old.jpg").touch()
        (folder / "thesis.txt").write_text("years of work")
    demo = run_demo(config)
    next(demo)
    assert {path.name for path in folder.iterdir()} == {"cap-demo.json", "thesis.txt"}
    assert (folder / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("out", "problem"),
    [
        ("file", "is a file; name a folder as --out"),
        ("nowhere", "is a link that leads nowhere; name a folder as --out"),
        ("file/demo", r"cannot write there \(Not a directory\)"),
        ("x" * 256, r"cannot write there \(File name too long\)"),
        ("/dev/full", "is a file; name a folder as --out"),
    ],
)
def test_what_is_no_folder_is_one_line(out: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("years of work")
    (tmp_path / "nowhere").symlink_to("absent")
    with pytest.raises(CapError, match=rf"^{tmp_path / out}: {problem}$"):
        next(run_demo(DemoConfig(out=tmp_path / out)))
    assert (tmp_path / "file").read_text() == "years of work"
    assert (tmp_path / "nowhere").is_symlink()


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(CapError, match=rf"^{tmp_path}: cannot write there \(No space left on dev"):
        list(run_demo(DemoConfig(out=tmp_path)))


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CapError, match="holds something else"):
        next(run_demo(DemoConfig(out=tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
