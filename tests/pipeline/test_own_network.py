"""A function of the user's own makes the encoder. It is run only where the user has named it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cache.store import open_cache
from pipeline.captioner import Captioner
from pipeline.encoder.encoder import Encoder, load_recorded
from pipeline.encoder.errors import EncoderError
from pipeline.encoder.precision import choose_precision, encode_plain
from pipeline.encoder.weights import load_backbone
from pipeline.extraction.verify import verify_cache
from tests.conftest import ROOT, write_photo
from tests.pipeline.test_cli import cap
from tests.pipeline.test_encoder import CPU, random_pixels

CODE = """
import torch
from pathlib import Path

def make_encoder():
    Path(__file__).with_name("ran").touch()
    layers = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
    network = torch.nn.Sequential(*layers, torch.nn.Flatten())
    return network, 8, {"image_size": 64, "filter": "bicubic", "mean": [0.5] * 3, "std": [1, 1, 1]}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "my encoder.py"
    path.write_text(CODE)
    return path


def code_with(returned: str) -> str:
    return f"import torch\ndef make():\n    return {returned}\n"


def test_a_function_makes_the_encoder_with_its_own_pixels(own: Path) -> None:
    torch.manual_seed(1)
    backbone = load_backbone(f"{own}:make_encoder", "")
    assert backbone.name.startswith("my encoder.py:make_encoder@")
    assert (backbone.weights, backbone.image_size) == (str(own), 64)
    expected = "rgb, bicubic antialiased, mean 0.5 0.5 0.5, std 1.0 1.0 1.0"
    assert str(backbone.preprocessing) == expected
    torch.manual_seed(2)
    again = load_backbone(f"{own}:make_encoder", "")
    assert again.weights_sha256 == backbone.weights_sha256
    pixels = random_pixels(2)
    features = Encoder(backbone, device=CPU, precision="float32", image_size=64).encode(pixels)
    with torch.no_grad():
        plain = again.network(pixels / 255 - 0.5)
    assert torch.allclose(features.float(), plain, atol=1e-3)


def test_from_photos_to_captions_it_runs_only_where_it_is_named(own: Path, tmp_path: Path) -> None:
    photos, cache, run = tmp_path / "photos", tmp_path / "x.h5", tmp_path / "run"
    lines = ["image,caption"]
    for seed in range(12):
        write_photo(photos / f"{seed}.jpg", seed)
        lines.append(f"{seed}.jpg,A photo number {seed}.")
    (tmp_path / "c.csv").write_text("\n".join(lines))
    named, ran = f"{own}:make_encoder", tmp_path / "ran"
    extract = ["extract-features", "--images", photos, "--out", cache, "--device", "cpu"]
    cap(*extract, "--captions", tmp_path / "c.csv", "--backbone", named)
    assert ran.exists()
    sha256 = open_cache(cache).encoder.backbone.partition("@")[2]
    program = f"the encoder is a program, {own.name}:make_encoder (SHA-256 {sha256[:12]}…)"
    advice = f"which is run only if you name it: --backbone {named}"
    train = ["--epochs", 1, "--hidden-size", 16, "--embedding-size", 8, "--min-count", 1]
    cap("train", "--from-cache", cache, "--out", run, *train, "--val-share", 0.2, "--device", "cpu")
    ran.unlink()
    photo = photos / "0.jpg"
    predict = ["predict", photo, "--model", run, "--device", "cpu"]
    _, err = cap(*predict, code=1)
    assert err == f"error: {program}, {advice}\n"
    with pytest.raises(EncoderError, match="is run only if you name it"):
        Captioner.load(run, device="cpu")
    assert "is run only if you name it" in verify_cache(cache, photos, device="cpu").problems[0]
    write_photo(photos / "12.jpg", 12)
    _, err = cap(*extract, "--update", code=1)
    assert err == f"error: {cache}: {program.replace('the enc', 'its enc')}, {advice}\n"
    assert not ran.exists()
    moved = tmp_path / "moved" / own.name
    moved.parent.mkdir()
    shutil.copy(own, moved)
    out, _ = cap(*predict, "--backbone", f"{moved}:make_encoder")
    assert out.startswith(f"{photo}\t")
    assert (tmp_path / "moved" / "ran").exists()
    assert verify_cache(cache, photos, weights=named, device="cpu").ok
    cap(*extract, "--update", "--backbone", named)
    assert len(open_cache(cache)) == 13
    ran.unlink()
    own.write_text(CODE + "\n")  # any other byte is another program
    _, err = cap(*predict, "--backbone", named, code=1)
    assert err.startswith(f"error: {own}: is not the file of {own.name}:make_encoder (SHA-256 ")
    _, err = cap(*extract, "--update", "--backbone", named, code=1)
    assert err.startswith(f"error: {cache}: made with backbone {own.name}:make_encoder@")
    _, err = cap(*predict, "--backbone", "resnet18", code=2)
    assert "--backbone is for a program, FILE.py:FUNCTION, and not 'resnet18'" in err
    _, err = cap(*predict, "--backbone", named, "--weights", "w.pth", code=2)
    assert "leave out --weights" in err
    assert not ran.exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_module", "cannot be run (line 1: ModuleNotFoundError: No module named"),
        ("def make(:", "cannot be run (line 1: SyntaxError: "),
        ("x = 1\nraise SystemExit(3)", "cannot be run (line 2: SystemExit: 3)"),
        ("def other(): pass", "has no function 'make'"),
        ("make = 3", "has no function 'make'"),
        ("\0", "cannot be run ("),
        ("def make():\n    return 1 / 0", "fails (line 2: ZeroDivisionError: division by zero)"),
        ("def make(x): pass", "fails (TypeError: make() missing 1 required"),
        (code_with("torch.nn.Flatten()"), "returns Flatten; must return network, feature_dim, p"),
        (code_with("1, 2"), "returns tuple of 2; must return"),
        (code_with("'net', 8, {}"), "the network is str, not a torch.nn.Module"),
        (code_with("torch.nn.Flatten(), 0, {}"), "feature_dim is 0, not a positive integer"),
        (code_with("torch.nn.Flatten(), 2.0, {}"), "feature_dim is 2.0, not a positive integer"),
        (code_with("torch.nn.Flatten(), 8, 224"), "preprocessing is int, not a dictionary"),
        (code_with("torch.nn.Flatten(), 8, {'size': 3}"), "preprocessing has 'size'; it has image"),
        (code_with("torch.nn.Flatten(), 8, {'image_size': '3'}"), "image_size is '3', not a pos"),
        (code_with("torch.nn.Flatten(), 8, {'filter': 'box'}"), "filter 'box' is neither bilinear"),
        (code_with("torch.nn.Flatten(), 8, {'mean': 0.5}"), "preprocessing: 'float' object"),
        (code_with("torch.nn.Flatten(), 8, {'std': [1, 0, 1]}"), "is not positive"),
        (code_with("torch.nn.Flatten(), 8, {'mean': [1, 2]}"), "preprocessing: not enough values"),
    ],
)
def test_what_a_file_does_wrong_is_one_line(code: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "my.py"
    path.write_text(code)
    with pytest.raises(EncoderError) as caught:
        load_backbone(f"{path}:make", "")
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("torch.nn.Conv2d(3, 8, 3), 8, {}", "gives numbers of shape (8, 62, 62) for a photo and"),
        ("torch.nn.Flatten(), 8, {}", "gives numbers of shape (12288,) for a photo and not one v"),
        ("torch.nn.Conv2d(4, 8, 3), 8, {}", "cannot take 64×64 pixels ("),
        ("torch.nn.LSTM(3, 8), 8, {}", "cannot take 64×64 pixels ("),
    ],
)
def test_features_of_another_shape_are_refused(returned: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "my.py"
    path.write_text(code_with(returned))
    backbone = load_backbone(f"{path}:make", "")
    with pytest.raises(EncoderError) as caught:
        backbone.check_image_size(64)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_and_weights_that_are_not_numbers_are_one_line(
    own: Path, tmp_path: Path
) -> None:
    with pytest.raises(EncoderError, match=r"absent\.py: cannot read \(No such file"):
        load_backbone(f"{tmp_path}/absent.py:make", "")
    with pytest.raises(EncoderError, match="makes a network with its weights; leave out --weights"):
        load_backbone(f"{own}:make_encoder", "w.pth")
    own.write_text(
        CODE.replace("    return", "    network[0].weight.data[0] = float('nan')\n    return")
    )
    with pytest.raises(EncoderError, match=r"0\.weight is not finite"):
        load_backbone(f"{own}:make_encoder", "")


def test_a_network_whose_shapes_cannot_be_computed_alone_still_runs(tmp_path: Path) -> None:
    """Its code uses a tensor that is no parameter and no buffer, and branches on numbers."""
    path = tmp_path / "my.py"
    path.write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.scale = torch.ones(3) * 2\n"
        "    def forward(self, x):\n"
        "        x = x.mean((2, 3)) * self.scale\n"
        "        return x if x.sum() > 0 else -x\n"
        "def make():\n"
        "    return Net(), 3, {'image_size': 32}\n"
    )
    backbone = load_backbone(f"{path}:make", "")
    backbone.check_image_size(32)
    encoder = Encoder(backbone, device=CPU, precision="float32", image_size=32)
    pixels = random_pixels(2, 32)
    expected = encode_plain(backbone, pixels, CPU)
    assert torch.allclose(encoder.encode(pixels).float(), expected, atol=1e-3)
    assert load_recorded(encoder.record, str(path)).name == backbone.name


def test_a_network_that_only_runs_in_float32_says_so(tmp_path: Path) -> None:
    path = tmp_path / "my.py"
    path.write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.basis = torch.ones(3, 5)\n"
        "    def forward(self, x):\n"
        "        x = x.mean((2, 3))\n"
        "        return (x if float(x.sum()) > -1e9 else -x) @ self.basis\n"
        "def make():\n"
        "    return Net(), 5, {'image_size': 32}\n"
    )
    backbone = load_backbone(f"{path}:make", "")
    pixels = random_pixels(2, 32)
    precision, notices = choose_precision(
        backbone, pixels, device=CPU, candidates=("bfloat16", "float32")
    )
    assert precision == "float32"
    assert "cannot run in bfloat16 (" in notices[0]
    assert notices[0].endswith("); use --precision float32")


def test_a_file_may_import_what_our_import_of_torch_leaves_out(tmp_path: Path) -> None:
    """In a fresh process, because modules stay imported."""
    path = tmp_path / "compiled.py"
    path.write_text("import torch._dynamo, torch.distributed.fsdp\n" + CODE)
    code = (
        "from train.torch_import import import_torch\n"
        "import_torch()\n"
        "from pipeline.encoder.weights import load_backbone\n"
        f"print(load_backbone({f'{path}:make_encoder'!r}, '').image_size)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert result.stdout.split() == ["64"]


def test_the_example_of_the_documentation_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8")
    (tmp_path / "my_encoder.py").write_text(text.split("```python\n")[1].split("```")[0])
    backbone = load_backbone(f"{tmp_path}/my_encoder.py:make_encoder", "")
    backbone.check_image_size(backbone.image_size)
    write_photo(tmp_path / "photos" / "a.jpg", 0)
    cap(
        "extract-features", "--images", tmp_path / "photos", "--out", tmp_path / "x.h5",
        "--backbone", f"{tmp_path}/my_encoder.py:make_encoder", "--device", "cpu",
    )  # fmt: skip
    assert open_cache(tmp_path / "x.h5").encoder.feature_dim == backbone.feature_dim
