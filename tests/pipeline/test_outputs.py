"""Files that captions are written to: nothing is lost, nothing of somebody else's is replaced."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from defusedxml.ElementTree import fromstring

from cache.atomic import WriteError
from pipeline.captioner.outputs.coco import IdsError
from pipeline.captioner.outputs.output import OutputFileError
from pipeline.captioner.outputs.outputs import Outputs
from pipeline.captioner.predictions import Caption, Prediction
from pipeline.captions.dataset import read_photos
from pipeline.captions.formats.beside import SIDECAR
from pipeline.captions.formats.inside import METADATA
from pipeline.captions.records import DatasetError
from pipeline.captions.writing import OutputOptions
from pipeline.evaluation.references import read_predictions
from train.config import SearchConfig
from train.option import SettingError

NAMES = ("a.jpg", 'b "quoted",\n.jpg', "\udcff.jpg", "=d.jpg")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.cap").write_bytes(b"weights")
    return tmp_path / "run"


def said(path: str, *captions: str, error: str = "") -> Prediction:
    if error:
        return Prediction(path, "", float("-inf"), error)
    found = tuple(Caption(text, -1.5, words=tuple(text.split())) for text in captions)
    return Prediction(path, captions[0], -1.5, captions=found)


def write(
    options: OutputOptions,
    model: Path,
    predictions: Sequence[Prediction],
    *,
    captions: int = 1,
    count: int | None = None,
    roots: Iterable[str] = (),
    finish: bool = True,
) -> tuple[list[str], list[str]]:
    """(the photos that were wanted, the lines that were said). count: how many are written."""
    photos = [prediction.path for prediction in predictions]
    search = SearchConfig(captions=captions)
    with Outputs(options, photos, model, search, roots) as outputs:
        wanted = outputs.wanted(photos)
        for prediction in [each for each in predictions if each.path in wanted][:count]:
            outputs.write(prediction)
        return wanted, outputs.finish() if finish else [outputs.kept()]


@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_file_cut_anywhere_is_continued_to_the_same_bytes(
    suffix: str, captions: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # for speed alone
    predictions = [said(name, *["A dog, ü.", 'A "cat".'][:captions]) for name in NAMES]
    out = tmp_path / f"x{suffix}"
    options = OutputOptions(out=out)
    write(options, model, predictions, captions=captions)
    whole = out.read_bytes()
    assert len(whole) > 250
    for end in range(0, len(whole) + 1, 3):
        out.write_bytes(whole[:end])
        wanted, _ = write(options, model, predictions, captions=captions)
        assert out.read_bytes() == whole, end
        assert wanted == list(NAMES)[len(NAMES) - len(wanted) :]
    wanted, _ = write(options, model, predictions, captions=captions)
    several_rows = suffix == ".csv" and captions == 2  # of which some might be missing
    assert wanted == [NAMES[-1]] * several_rows


def test_rows_are_what_tables_and_json_readers_read(model: Path, tmp_path: Path) -> None:
    predictions = [said('b "x",\n.jpg', "A dog, ü."), said("c.jpg", error="cannot read (x)")]
    write(OutputOptions(out=tmp_path / "x.csv"), model, predictions)
    with (tmp_path / "x.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(row.values())[:4] for row in rows] == [
        ['b "x",\n.jpg', "A dog, ü.", "-1.5000", ""],
        ["c.jpg", "", "", "cannot read (x)"],
    ]


def test_json_lines_are_those_that_are_printed_and_a_mark(model: Path, tmp_path: Path) -> None:
    predictions = [said("\udcff.jpg", "A dog.", "A cat."), said("c.jpg", error="broken")]
    write(OutputOptions(out=tmp_path / "x.jsonl"), model, predictions, captions=2)
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_bytes().splitlines()]
    for line, prediction in zip(lines, predictions, strict=True):
        mark = line.pop("written_by_cap")
        assert mark.startswith("run/best.cap ")
        assert line == prediction.as_dict()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".coco.json"])
def test_photos_that_had_an_error_are_tried_again(suffix: str, model: Path, tmp_path: Path) -> None:
    options = OutputOptions(out=tmp_path / f"x{suffix}")
    first = [said("1.jpg", "A."), said("2.jpg", error="broken"), said("3.jpg", "C.")]
    write(options, model, first)
    wanted, _ = write(options, model, [first[0], said("2.jpg", "B."), first[2]])
    assert wanted == ["2.jpg"]
    text = (tmp_path / f"x{suffix}").read_text()
    assert "broken" not in text
    assert [text.count(caption) for caption in ("A.", "B.", "C.")] == (
        [1, 1, 1] if suffix != ".jsonl" else [2, 2, 2]  # as the caption, and among its words
    )


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".coco.json"])
def test_files_of_others_and_of_other_models_stay_unless_told_otherwise(
    suffix: str, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"x{suffix}"
    options, predictions = OutputOptions(out=out), [said("1.jpg", "A dog.")]
    for theirs in (
        b"image,caption\n1.jpg,mine\n",
        b'[{"image_id": 1, "caption": "x"}]',
        b'{"path": "x"}',
        b"\0",
    ):
        out.write_bytes(theirs)
        with pytest.raises(OutputFileError, match="holds something that cap did not write"):
            write(options, model, predictions)
        assert out.read_bytes() == theirs
    told = replace(options, overwrite=True)
    write(told, model, predictions, count=0, finish=False)
    assert out.read_bytes() == theirs  # until there is a caption
    write(told, model, predictions)
    ours = out.read_bytes()
    assert b"A dog." in ours
    with pytest.raises(OutputFileError, match=r"captions by run/best\.cap, of another training or"):
        write(replace(options, words=True), model, predictions)
    (model / "best.cap").write_bytes(b"other weights")
    with pytest.raises(OutputFileError, match=r"captions by run/best\.cap, of another training or"):
        write(options, model, predictions)
    assert out.read_bytes() == ours


def test_two_commands_do_not_write_one_file(model: Path, tmp_path: Path) -> None:
    options = OutputOptions(out=tmp_path / "x.csv")
    with Outputs(options, ["a.jpg"], model, SearchConfig()) as outputs:
        with pytest.raises(OutputFileError, match="another cap process writes it"):
            write(options, model, [said("a.jpg", "A dog.")])
        outputs.write(said("a.jpg", "A cat."))
    assert write(options, model, [said("a.jpg", "A dog.")])[0] == []
    assert "A cat." in (tmp_path / "x.csv").read_text()


def test_a_command_that_writes_nothing_leaves_no_file(model: Path, tmp_path: Path) -> None:
    options = OutputOptions(out=tmp_path / "x.csv")
    write(options, model, [said("a.jpg", "A dog.")], count=0, finish=False)
    assert not (tmp_path / "x.csv").exists()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".coco.json"])
def test_a_full_disk_leaves_whole_rows(
    suffix: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = OutputOptions(out=tmp_path / f"x{suffix}")
    predictions = [said(f"{n}.jpg", f"Dog {n}.") for n in range(3)]
    real, calls = os.write, 0

    def full(fd: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == 3:
            return real(fd, bytes(data)[:7])
        if calls > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(WriteError, match=r"No space left on device\); .* captions of 2 photos"):
        write(options, model, predictions)
    (left,) = tmp_path.glob("x.*")  # results of COCO are in another file until all is done
    assert left.read_bytes().endswith(b"\n")
    monkeypatch.setattr(os, "write", real)
    wanted, _ = write(options, model, predictions)
    assert wanted == ["2.jpg"]
    text = (tmp_path / f"x{suffix}").read_text()
    assert all(f"Dog {n}." in text for n in range(3))
    assert not list(tmp_path.glob("*.part"))


def test_coco_results_have_the_ids_of_a_list_or_of_cocos_names(model: Path, tmp_path: Path) -> None:
    names = ["test/COCO_test2014_000000000042.jpg", "000000000007.jpg"]
    predictions = [said(name, f"Photo {n}.") for n, name in enumerate(names)]
    out = tmp_path / "x.coco.json"
    write(OutputOptions(out=out), model, predictions)
    assert read_predictions(out) == {"42": "Photo 0.", "7": "Photo 1."}
    entries = json.loads(out.read_text())
    assert [entry["image_id"] for entry in entries] == [42, 7]
    ids = tmp_path / "ids.json"
    images = [{"file_name": Path(name).name, "id": n + 5} for n, name in enumerate(names)]
    ids.write_text(json.dumps({"images": images}))
    options = OutputOptions(out=tmp_path / "y.coco.json", ids=ids)
    write(options, model, predictions)
    assert read_predictions(tmp_path / "y.coco.json") == {"5": "Photo 0.", "6": "Photo 1."}
    with pytest.raises(IdsError, match=r"^dog\.jpg: has no id in .*ids\.json$"):
        write(options, model, [said("dog.jpg", "A dog.")])
    with pytest.raises(IdsError, match=r"^dog\.jpg: has no number in its name"):
        write(OutputOptions(out=out), model, [said("dog.jpg", "A dog.")])
    with pytest.raises(IdsError, match=r"has the id 7, and so has 000000000007\.jpg"):
        write(OutputOptions(out=out), model, [predictions[1], said("x/7.jpg", "A dog.")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "has no images with file_name and id"),
        ('{"images": [{"file_name": "a.jpg", "id": "x"}]}', "which is no whole number"),
        (
            '{"images": [{"file_name": "a", "id": 1}, {"file_name": "a", "id": 2}]}',
            "a has two ids, 1 and 2",
        ),
    ],
)
def test_a_wrong_list_of_ids_is_one_line(
    content: str, message: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "ids.json").write_text(content)
    options = OutputOptions(out=tmp_path / "x.coco.json", ids=tmp_path / "ids.json")
    with pytest.raises(IdsError, match=message):
        write(options, model, [said("a.jpg", "A dog.")])


def test_texts_beside_photos_are_ours_and_nobody_elses(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    names = ["a.jpg", "a.png", "p.jpg", "q.jpg", "e.jpg", "sub/a.jpg", "t.txt", "plain"]
    for name in names:
        (folder / name).write_bytes(b"photo")
    (folder / "p.txt").write_text("A person wrote this.\n")
    (folder / "q.txt").write_bytes(b"PNG\0")
    options = OutputOptions(sidecar=True)

    def all_say(text: str) -> list[Prediction]:
        told = [said(str(folder / name), text, "Another.") for name in names]
        return [
            said(each.path, error="broken") if each.path.endswith("e.jpg") else each
            for each in told
        ]

    _, lines = write(options, model, all_say("A dog."))
    assert lines == [
        "wrote 5 .txt files with captions",
        "2 .txt files not replaced, because cap did not write what is there (first: "
        f"{folder / 'p.txt'}); --overwrite replaces texts",
    ]
    texts = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.read_bytes() != b"photo"
    }
    assert list(texts) == [
        *("a.jpg.txt", "a.png.txt", "p.txt", "plain.txt", "q.txt", "sub/a.txt", "t.txt.txt")
    ]
    first, second, mark = texts["a.jpg.txt"].decode().splitlines()
    assert (first, second) == ("A dog.", "Another.")
    assert mark.startswith("written_by_cap: a.jpg by run/best.cap ")
    assert texts["p.txt"] == b"A person wrote this.\n"
    assert write(options, model, all_say("A dog."))[0] == [str(folder / "e.jpg")]
    os.utime(folder / "sub" / "a.jpg", (2e9, 2e9))  # changed since
    assert write(options, model, all_say("A cow."))[0] == [
        str(folder / "e.jpg"),
        str(folder / "sub" / "a.jpg"),
    ]
    os.utime(folder / "sub" / "a.jpg", (1e9, 1e9))
    (model / "best.cap").write_bytes(b"other weights")
    write(options, model, all_say("A cat."))
    assert (folder / "a.jpg.txt").read_text().startswith("A cat.\n")
    assert (folder / "p.txt").read_text() == "A person wrote this.\n"
    write(replace(options, overwrite=True), model, all_say("A cow."))
    assert (folder / "p.txt").read_text().startswith("A cow.\n")
    assert (folder / "q.txt").read_bytes() == b"PNG\0"  # no text
    assert (folder / "t.txt").read_bytes() == b"photo"


def test_texts_in_a_folder_of_their_own_keep_the_folders_of_photos(
    model: Path, tmp_path: Path
) -> None:
    options = OutputOptions(sidecar=True, sidecar_folder=tmp_path / "out")
    top = str(tmp_path / "photos")
    predictions = [said(f"{top}/{name}", "A dog.") for name in ("x/a.jpg", "y/a.jpg")]
    write(options, model, predictions, roots=[top])
    assert (tmp_path / "out" / "x" / "a.txt").exists()
    assert (tmp_path / "out" / "y" / "a.txt").exists()
    local = [said(name, "A dog.") for name in ("x/a.jpg", "y/a.jpg")]
    here = OutputOptions(sidecar=True, sidecar_folder=tmp_path / "here")
    write(here, model, local, roots=["./"])  # below which paths have no dot
    assert (tmp_path / "here" / "y" / "a.txt").exists()
    with pytest.raises(OutputFileError, match=r"a\.txt: .*x/a\.jpg and .*y/a\.jpg would share it"):
        write(options, model, predictions)


def test_a_folder_that_may_not_be_written_is_known_before_any_caption(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(WriteError, match=r"may not write there; .*--sidecar-folder"):
        write(OutputOptions(sidecar=True), model, [said(str(tmp_path / "a.jpg"), "A dog.")])


def test_xmp_is_well_formed_and_that_of_other_programs_stays(model: Path, tmp_path: Path) -> None:
    names = ["a.jpg", "b<&\"'>.jpg", "raw.jpg", "p.jpg", "\udcff.jpg"]
    for name in (*names, "raw.CR2"):
        (tmp_path / name).write_bytes(b"photo")
    theirs = '<x:xmpmeta xmlns:x="adobe:ns:meta/">darktable</x:xmpmeta>'
    (tmp_path / "p.xmp").write_text(theirs)
    hostile = "A <dog> & \x00\x1b \ufffe\n]]> 'cat' \"ü\" \udc80"
    predictions = [said(str(tmp_path / name), hostile) for name in names]
    options = OutputOptions(xmp=True)
    write(options, model, predictions)
    for name in ("a.xmp", "b<&\"'>.xmp", "raw.jpg.xmp", "\udcff.xmp"):
        root = fromstring((tmp_path / name).read_bytes())
        (item,) = root.iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li")
        assert item.text == "A <dog> & \ufffd\ufffd \ufffd ]]> 'cat' \"ü\" \ufffd"
    assert not (tmp_path / "raw.xmp").exists()  # which is the raw photo's
    assert write(options, model, predictions)[0] == []
    rated = (tmp_path / "a.xmp").read_text().replace('rdf:about=""', 'rdf:about="" xmp:Rating="5"')
    (tmp_path / "a.xmp").write_text(rated)
    (model / "best.cap").write_bytes(b"other weights")
    again = [said(each.path, "A cat.") for each in predictions]
    write(replace(options, overwrite=True), model, again)
    assert (tmp_path / "a.xmp").read_text() == rated
    assert (tmp_path / "p.xmp").read_text() == theirs
    assert "A cat." in (tmp_path / "raw.jpg.xmp").read_text()


def test_no_model_learns_from_what_was_written(model: Path, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    names = [f"{n}.jpg" for n in range(4)]
    for name in names:
        shutil.copy(photos / "a.jpg", folder / name)
    predictions = [said(str(folder / name), f"Dog {name}.") for name in names]
    for suffix in (".csv", ".jsonl", ".coco.json"):
        out = tmp_path / f"x{suffix}"
        write(OutputOptions(out=out, sidecar=True, xmp=True), model, predictions)
        with pytest.raises(DatasetError, match="written by this program"):
            read_photos(folder, out)
    for word in (SIDECAR, METADATA):
        with pytest.raises(DatasetError, match="because this program wrote their captions"):
            read_photos(folder, Path(word))


def test_no_photo_is_ever_replaced(model: Path, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"photo")
    options = OutputOptions(out=tmp_path / "x.csv", overwrite=True)
    with pytest.raises(OutputFileError, match="is one of the photos, which are never changed"):
        write(options, model, [said(str(tmp_path / "x.csv"), "A dog.")])
    (tmp_path / "a.txt").write_bytes(b"photo")
    names = [str(tmp_path / name) for name in ("a.jpg", "a.txt")]
    with pytest.raises(OutputFileError, match=r"a\.txt: is one of the photos"):
        write(
            OutputOptions(sidecar=True, overwrite=True),
            model,
            [said(name, "A dog.") for name in names],
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out": Path("x.tsv")}, r"x\.tsv ends in none of \.csv, \.jsonl, \.coco\.json"),
        ({"out": Path(".csv")}, "ends in none"),
        ({"out": Path("x.csv"), "ids": Path("y")}, "--ids has no effect"),
        ({"sidecar_folder": Path("y")}, "--sidecar-folder has no effect"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Path], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        OutputOptions(**settings)  # type: ignore[arg-type]
