import json
from pathlib import Path

import pytest

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


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CapError, match="holds something else"):
        next(run_demo(DemoConfig(out=tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
