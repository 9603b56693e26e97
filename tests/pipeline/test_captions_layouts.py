"""Every layout in which people keep captions is read, with the right rows. The words are ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pipeline.captions.dataset import read_captions, read_dataset, read_photos
from pipeline.captions.photos import Photos
from pipeline.captions.records import Choice, DatasetError, Photo
from pipeline.cli.options import options
from pipeline.extraction.config import ExtractConfig
from tests.pipeline.test_cli import cap
from train.option import SettingError

DOG, CAT = "A dog, wet, runs.", "A cat sits."


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("p1.jpg", "p2.jpg", "p3.jpg"):
        (folder / name).touch()
    return folder


def read(images: Path, content: object, encoding: str = "utf-8", **choice: str) -> Photos:
    file = images.parent / "captions"
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    file.write_bytes(text.encode(encoding))
    return read_photos(images, file, **choice)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "image_name| comment_number| comment\np1.jpg| 0| A dog, wet, runs.\np2.jpg| 0| A cat sits.",
        "p1.jpg| 0| A dog, wet, runs.\np2.jpg| 0| A cat sits.\n",  # no header
        "image;caption\r\np1.jpg;A dog, wet, runs.\r\np2.jpg;A cat sits.\r\n",
        "filename\ttext\np1.jpg\tA dog, wet, runs.\np2.jpg\tA cat sits.\n",
        ',image,caption\n0,p1.jpg,"A dog, wet, runs."\n1,p2.jpg,A cat sits.\n',
        'id,image,caption\n7,p1.jpg,"A dog, wet, runs."\n8,p2.jpg,A cat sits.\n',
        'file_name,text\np1.jpg,"A dog, wet, runs."\np2.jpg,A cat sits.\n',
        '"p1.jpg","A dog, wet, runs."\n"p2.jpg","A cat sits."\n',
        'caption,image\n"A dog, wet, runs.",p1.jpg\nA cat sits.,p2.jpg\n',
        'image,caption\n"A dog, wet, runs.",p1.jpg\nA cat sits.,p2.jpg\n',  # the header is wrong
        "image_name,comment_number,comment\np1.jpg,0,A dog, wet, runs.\np2.jpg,1,A cat sits.\n",
        'image,caption,source\np1.jpg,"A dog, wet, runs.",web\np2.jpg,A cat sits.,web\n',
        "Datei;Text dazu;Jahr\np1.jpg;A dog, wet, runs.;1999\np2.jpg;A cat sits.;2001\n",
        "p1.jpg#0\tA dog, wet, runs.\np2.jpg#0\tA cat sits.\n",
        "p1.jpg#zhc#0 A dog, wet, runs.\np2.jpg#zhc#0 A cat sits.\n",
        "p1.jpg A dog, wet, runs.\np2.jpg A cat sits.\n",
        "sep=;\nimage;caption\np1.jpg;A dog, wet, runs.\np2.jpg;A cat sits.\n",
        "image;caption;;\np1.jpg;A dog, wet, runs.;;\np2.jpg;A cat sits.;;\n",
        "\ufeffimage\tcaption\np1.jpg\tA dog, wet, runs.\np2.jpg\tA cat sits.\n",
        "image,caption\rp1.jpg,A dog, wet, runs.\rp2.jpg,A cat sits.\r",
    ],
)
def test_tables_of_every_layout_give_the_same_rows(images: Path, text: str) -> None:
    assert read(images, text) == [
        Photo("p1.jpg", "p1.jpg", (DOG,)),
        Photo("p2.jpg", "p2.jpg", (CAT,)),
    ]


@pytest.mark.parametrize(
    "value",
    [
        {"p1.jpg": [DOG], "p2.jpg": [CAT]},
        {"p1.jpg": DOG, "p2.jpg": CAT},
        {"p1.jpg": {"captions": [DOG]}, "p2.jpg": {"captions": [CAT]}},
        [
            {"image_id": "p1.jpg", "caption": [DOG], "url": "x"},
            {"image_id": "p2.jpg", "caption": [CAT]},
        ],
        {"data": {"items": [{"photo": "p1.jpg", "text": DOG}, {"photo": "p2.jpg", "text": CAT}]}},
        [
            {"file": "p1.jpg", "notes": [{"who": "a", "words": DOG}]},
            {"file": "p2.jpg", "notes": [{"who": "b", "words": CAT}]},
        ],
        [
            {"image": {"file_name": "p1.jpg"}, "caption": DOG},
            {"image": {"file_name": "p2.jpg"}, "caption": CAT},
        ],
        {"image": ["p1.jpg", "p2.jpg"], "caption": [DOG, CAT]},
        {"image": {"0": "p1.jpg", "1": "p2.jpg"}, "caption": {"0": DOG, "1": CAT}},
        [["p1.jpg", DOG], ["p2.jpg", CAT]],
        [
            {"image.file_name": "p1.jpg", "image.caption": DOG},
            {"image.file_name": "p2.jpg", "image.caption": CAT},
        ],
        [{"regions": [{"file": "p1.jpg", "phrase": DOG}, {"file": "p2.jpg", "phrase": CAT}]}],
        [
            {
                "image": name,
                "conversations": [
                    {"from": "human", "value": "What is here?"},
                    {"from": "gpt", "value": text},
                ],
            }
            for name, text in (("p1.jpg", DOG), ("p2.jpg", CAT))
        ],
    ],
)
def test_json_of_every_structure_gives_the_same_rows(images: Path, value: object) -> None:
    assert read(images, value) == [
        Photo("p1.jpg", "p1.jpg", (DOG,)),
        Photo("p2.jpg", "p2.jpg", (CAT,)),
    ]


def test_json_lines_are_read_and_a_broken_one_is_counted(images: Path) -> None:
    lines = [json.dumps({"file_name": "p1.jpg", "text": f"Dog {n} runs."}) for n in range(12)]
    photos = read(images, "\n".join([*lines, '{"file_name": "p2.jpg", "te']))
    assert photos == [Photo("p1.jpg", "p1.jpg", tuple(f"Dog {n} runs." for n in range(12)))]
    lines = read_dataset(images.parent / "captions", Choice(), images=images).lines()
    assert any("1 of 13 rows cannot be read (line 13: not valid JSON" in line for line in lines)


def test_names_without_suffix_and_ids_beside_names_are_kept(images: Path) -> None:
    raw = [
        {"file_path": "val/p1.jpg", "captions": [DOG, "Wet!"], "id": 391},
        {"file_path": "val/p2.jpg", "captions": [CAT], "id": 392},
    ]
    assert read(images, raw) == [
        Photo("391", "p1.jpg", (DOG, "Wet!")),
        Photo("392", "p2.jpg", (CAT,)),
    ]
    by_number = [{"image_id": 12, "phrase": DOG}, {"image_id": 13, "phrase": CAT}]
    (images / "12.png").touch()
    assert read(images, by_number) == [Photo("12", "12.png", (DOG,))]


def test_reports_on_several_photos_are_read_by_split(images: Path) -> None:
    reports = {
        "train": [{"id": "a", "report": "The heart is small.", "image_path": ["p1.jpg", "p2.jpg"]}],
        "val": [{"id": "b", "report": "No fluid.", "image_path": ["p3.jpg"]}],
    }
    assert [photo.path for photo in read(images, reports)] == ["p1.jpg", "p2.jpg", "p3.jpg"]
    assert read(images, reports, split="train") == [
        Photo("p1.jpg", "p1.jpg", ("The heart is small.",)),
        Photo("p2.jpg", "p2.jpg", ("The heart is small.",)),
    ]
    with pytest.raises(DatasetError, match="no split test; it has train, val"):
        read(images, reports, split="test")


def test_a_table_may_have_a_split_column_and_numbered_caption_columns(images: Path) -> None:
    text = (
        "image,caption_1,caption_2,split\np1.jpg,A dog runs.,Dogs.,train\np2.jpg,A cat sits.,,val\n"
    )
    assert read(images, text, split="train") == [
        Photo("p1.jpg", "p1.jpg", ("A dog runs.", "Dogs."))
    ]


def test_a_table_of_addresses_has_its_captions_first(images: Path) -> None:
    text = "A dog, wet, runs.\thttp://x.org/a/p1.jpg?w=9\nA cat sits.\thttps://x.org/b/p2.jpg\n"
    assert [(p.path, p.captions) for p in read(images, text)] == [
        ("p1.jpg", (DOG,)),
        ("p2.jpg", (CAT,)),
    ]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Ein Hündchen läuft.", "latin-1"),
        ("Un chien court dans l’été.", "cp1252"),
        ("Ein Hündchen läuft.", "utf-16"),
        ("Ein Hündchen läuft.", "utf-16-le"),
        ("Ein Hündchen läuft.", "utf-16-be"),
        ("Ein Hündchen läuft.", "utf-32"),
        ("Ein Hündchen läuft.", "utf-8-sig"),
        ("Собака бежит по траве.", "cp1251"),
        ("一只狗在草地上奔跑。", "gb18030"),
        ("犬が草の上を走っている。", "shift_jis"),
    ],
)
def test_the_encoding_is_found(images: Path, text: str, encoding: str) -> None:
    table = f"image\tcaption\r\np1.jpg\t{text}\r\np2.jpg\t{CAT}\r\n"
    assert [photo.captions for photo in read(images, table, encoding)] == [(text,), (CAT,)]
    value = {"p1.jpg": text, "p2.jpg": CAT}
    assert [photo.captions for photo in read(images, value, encoding)] == [(text,), (CAT,)]


def test_a_guessed_encoding_is_said_and_shown(images: Path) -> None:
    read(images, f"image;caption\np1.jpg;{CAT}\np2.jpg;Ein Hündchen.\n", "latin-1")
    lines = read_dataset(images.parent / "captions", Choice(), images=images).lines()
    assert "; ISO-8859-1 or Windows-1252;" in lines[0].replace(", ISO", "; ISO")
    assert lines[1].endswith("first caption, of p2.jpg: Ein Hündchen.")
    assert "the encoding is a guess" in lines[2]


def test_several_files_are_joined_by_photo(images: Path) -> None:
    table, coco = images.parent / "a.csv", images.parent / "b.json"
    table.write_text("image,caption\nimg/p1.jpg,A dog.\np2.jpg,A cat.\n")
    notes = [(1, "A dog."), (1, "Wet!"), (3, "A cow.")]
    coco.write_text(
        json.dumps(
            {
                "images": [{"id": n, "file_name": f"p{n}.jpg"} for n in (1, 3)],
                "annotations": [{"image_id": n, "caption": text} for n, text in notes],
            }
        )
    )
    said: list[str] = []
    assert read_photos(images, [table, coco], say=said.append) == [
        Photo("img/p1.jpg", "p1.jpg", ("A dog.", "Wet!")),
        Photo("p2.jpg", "p2.jpg", ("A cat.",)),
        Photo("3", "p3.jpg", ("A cow.",)),
    ]
    assert said[-1] == "together: 3 photos, 4 captions"


def test_what_was_understood_is_said(images: Path) -> None:
    text = "image;caption\np1.jpg;A dog runs.\np1.jpg;Dogs.\np2.jpg;一只猫在草地上\nzz.jpg;A cow.\n"
    read(images, text)
    file = images.parent / "captions"
    assert read_dataset(file, Choice(), images=images).lines() == [
        f"{file}: table with semicolons, UTF-8; photos in column 'image', captions in column "
        "'caption'; 2 of 3 photos found; 3 captions (1 to 2 per photo); Latin script",
        f"{file}: first caption, of p1.jpg: A dog runs.",
        f"{file}: 1 photos are not in {images} and are left out (first: zz.jpg)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "image,one,two\np1.jpg,A dog runs.,Ein Hund rennt.\np2.jpg,A cat sits.,Da sitzt sie.\n",
            r"columns 'one' and 'two' both hold text; the first rows are \['image'\] \['one'\] "
            r"\['two'\] and \['p1.jpg'\] .*; name the columns with --image-column and --cap",
        ),
        ("image,label\np1.jpg,3\np2.jpg,4\n", "no column holds sentences"),
        ("The dog runs.\nThe cat sits.\n", "no column names photos"),
    ],
)
def test_what_is_not_clear_is_not_guessed(images: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(images, text)


@pytest.mark.parametrize("column", ["two", "3", "Two"])
def test_columns_can_be_named(images: Path, column: str) -> None:
    text = (
        "image,one,two\np1.jpg,A dog runs.,Ein Hund rennt.\np2.jpg,A cat sits.,Eine Katze sitzt.\n"
    )
    photos = read(images, text, caption_column=column)
    assert photos[0] == Photo("p1.jpg", "p1.jpg", ("Ein Hund rennt.",))
    with pytest.raises(DatasetError, match="--caption-column 9: no such column; there are 'image'"):
        read(images, text, caption_column="9")
    records = [{"a": "p1.jpg", "b": "A dog runs.", "c": "Ein Hund rennt."}]
    assert read(images, records, image_column="a", caption_column="c")[0].captions == (
        "Ein Hund rennt.",
    )


def test_cap_info_shows_how_a_captions_file_is_understood(images: Path) -> None:
    file = images.parent / "c.csv"
    file.write_text("image,caption\np1.jpg,A dog runs.\np9.jpg,A cat sits.\n")
    out, err = cap("info", file, "--images", images)
    assert "1 of 2 photos found; 1 captions (1 per photo); Latin script" in out
    assert "first caption, of p1.jpg: A dog runs." in out
    assert err == ""
    facts = json.loads(cap("info", file, "--json")[0])
    assert (facts["photos_named"], facts["photos_found"], facts["captions"]) == (2, None, 2)
    _, err = cap("info", file, "--caption-column", "image", "--image-column", "image", code=1)
    assert "column 'image' names the photos" in err
    _, err = cap("info", file, "--unreadable", code=2)


def test_the_command_line_takes_several_captions_files(images: Path) -> None:
    config = ExtractConfig(images, images / "x.h5")
    assert config.captions is None
    seen = []

    @options
    def command(*, config: ExtractConfig) -> None:
        seen.append(config.captions)

    app = typer.Typer()
    app.command()(command)
    told = ["--images", ".", "--out", "x.h5"]
    CliRunner().invoke(app, told)
    CliRunner().invoke(app, [*told, "--captions", "a.csv", "--captions", "sidecar"])
    assert seen == [None, (Path("a.csv"), Path("sidecar"))]


def test_options_without_effect_are_refused(images: Path) -> None:
    with pytest.raises(SettingError, match="have no effect without a file"):
        read_photos(images, Path("sidecar"), caption_column="text")
    with pytest.raises(DatasetError, match="--captions sidecar has no splits"):
        read_photos(images, Path("sidecar"), split="train")
    with pytest.raises(DatasetError, match="--captions sidecar needs a folder of photos"):
        read_captions(Path("sidecar"))
