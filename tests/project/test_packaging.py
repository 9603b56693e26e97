"""The wheel holds the three floors and nothing else, and works where the checkout is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

from tests.conftest import ROOT, write_photo

FLOORS = ("cache", "train", "pipeline")
DATA = {
    "pipeline/captioner/serve/page/docs.html",
    "pipeline/captioner/serve/page/docs.js",
    "pipeline/captioner/serve/page/icon.svg",
    "pipeline/captioner/serve/page/page.css",
    "pipeline/captioner/serve/page/page.html",
    "pipeline/captioner/serve/page/page.js",
    "pipeline/demo/demo_backbone.pth",
    "pipeline/gallery/page.css",
    "pipeline/gallery/page.html",
    "pipeline/gallery/page.js",
    "pipeline/photos/gpu/resize.cu",
    "train/step/cuda/kernels.cu",
}
METADATA = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not in a git checkout"
)


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command that knows nothing of the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, without what git ignores: building leaves files in its source."""
    folder = tmp_path_factory.mktemp("source")
    listed = run(*("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"), cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # else it is deleted, but not yet in the index
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@dataclass(frozen=True)
class Built:
    sdist: Path
    wheel: Path  # built from the files of the sdist


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    out = tmp_path_factory.mktemp("dist")
    # Without isolation: the build would otherwise download setuptools.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Built(sdist, wheel)


@pytest.fixture(scope="module")
def bin_folder(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a new environment with the wheel and, by reference, the packages of this one.

    The checkout stays out of reach: Python follows the `.pth` file of an editable install only in
    the environment's own site-packages.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "packages_of_the_tests.pth").write_text("\n".join(packages) + "\n")
    run(
        *(folder / "bin/python", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"),
        *("--ignore-installed", built.wheel),  # the editable install counts as installed
        cwd=folder,
    )
    return folder / "bin"


def test_the_wheel_holds_the_three_floors_and_nothing_else(source: Path, built: Built) -> None:
    modules = {
        str(PurePosixPath(path.relative_to(source)))
        for floor in FLOORS
        for path in (source / floor).rglob("*.py")
    }
    assert "pipeline/cli/main.py" in modules
    markers = {f"{floor}/py.typed" for floor in FLOORS}
    dist_info = f"{PROJECT['project']['name']}-{PROJECT['project']['version']}.dist-info"
    with zipfile.ZipFile(built.wheel) as file:
        names = set(file.namelist())
    assert names == modules | markers | DATA | {f"{dist_info}/{name}" for name in METADATA}


def test_the_sdist_holds_what_the_wheel_is_built_from(built: Built) -> None:
    with tarfile.open(built.sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", *DATA} <= names


def test_the_installed_package_is_complete(bin_folder: Path, tmp_path: Path) -> None:
    code = (
        "import cache, pipeline, train.step.cuda; from importlib.metadata import version;"
        "from pipeline.demo.run import OWN_WEIGHTS;"
        "files = cache.__file__, pipeline.__file__, train.step.cuda.__file__, OWN_WEIGHTS;"
        "print(*files, version('cap'), sep='\\n')"
    )
    *files, number = run(bin_folder / "python", "-c", code, cwd=tmp_path).splitlines()
    assert number == PROJECT["project"]["version"]
    for name in files:
        assert Path(name).is_relative_to(bin_folder.parent), name
    _, _, cuda, weights = map(Path, files)
    for path in (cuda.with_name("kernels.cu"), weights):
        checkout = ROOT / path.relative_to(cuda.parents[3])
        assert path.read_bytes() == checkout.read_bytes()


def test_the_installed_commands_caption_a_photo(bin_folder: Path, tmp_path: Path) -> None:
    cap = bin_folder / "cap"
    assert "extract-features" in run(cap, "--help", cwd=tmp_path)
    lines = ["image,caption"]
    for seed in range(8):
        write_photo(tmp_path / f"photos/{seed}.jpg", seed)
        lines.append(f"{seed}.jpg,a photo of noise")
    (tmp_path / "captions.csv").write_text("\n".join(lines) + "\n")
    run(
        *(cap, "extract-features", "--images", "photos", "--captions", "captions.csv"),
        *("--out", "x.h5", "--backbone", "shufflenet_v2_x0_5", "--weights", "random"),
        *("--image-size", 64, "--device", "cpu"),
        cwd=tmp_path,
    )
    run(
        *(cap, "train", "--from-cache", "x.h5", "--out", "run", "--recipe", "classic"),
        *("--epochs", 1, "--hidden-size", 16, "--select-by", "loss", "--device", "cpu"),
        cwd=tmp_path,
    )
    out = run(cap, "predict", "photos/0.jpg", "--model", "run", "--device", "cpu", cwd=tmp_path)
    assert out.startswith("photos/0.jpg\t")


def test_the_lowest_versions_are_those_of_pyproject(tmp_path: Path) -> None:
    script = ROOT / "scripts/lowest_versions.py"
    lines = run(sys.executable, script, cwd=ROOT).splitlines()
    optional = PROJECT["project"]["optional-dependencies"].values()
    declared = [*PROJECT["project"]["dependencies"], *(one for extra in optional for one in extra)]
    assert {line.replace("==", ">=") for line in lines} == set(declared)
    assert "torch>=2.11" in declared

    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\n[project]\ndependencies = []\n'
        "[project.optional-dependencies]\n"
    )
    refused = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert refused.stderr == ("pyproject.toml: 'setuptools' must have the form name>=version\n")
