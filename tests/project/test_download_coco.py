"""The download script against a server of our own."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("curl") is None and shutil.which("wget") is None, reason="no curl, no wget"
)
PHOTO = os.urandom(20_000)


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("tiny/a.jpg", PHOTO)
    return buffer.getvalue()


class Server:
    """Serves one archive, byte ranges included, and remembers which were asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.starts: list[int] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers.get("Range", "bytes=0-")
                start = int(asked.removeprefix("bytes=").split("-")[0])
                outer.starts.append(start)
                body = outer.data[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                if start:
                    end = len(outer.data)
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(archive())
    yield made
    made.server.shutdown()
    made.server.server_close()


def download(
    server: Server, folder: Path, *arguments: str, md5: str | None = None
) -> subprocess.CompletedProcess[str]:
    table = folder.with_name("table.txt")
    md5 = md5 or hashlib.md5(server.data).hexdigest()
    table.write_text(f"{md5} {len(server.data)} zips/tiny.zip\n")
    return subprocess.run(
        [str(ROOT / "scripts" / "download_coco.sh"), *arguments, str(folder)],
        env=os.environ | {"COCO_BASE_URL": server.url, "COCO_CHECKSUMS": str(table)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_an_archive_is_downloaded_checked_and_unpacked_once(server: Server, tmp_path: Path) -> None:
    result = download(server, tmp_path / "coco")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "coco/tiny/a.jpg").read_bytes() == PHOTO
    assert not list((tmp_path / "coco").glob("*.zip*"))
    assert server.starts == [0]
    again = download(server, tmp_path / "coco")
    assert again.returncode == 0
    assert "tiny: already done" in again.stderr
    assert server.starts == [0]


def test_an_interrupted_download_goes_on(server: Server, tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/tiny.zip.part").write_bytes(server.data[:7000])
    result = download(server, tmp_path / "coco")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "coco/tiny/a.jpg").read_bytes() == PHOTO
    assert server.starts == [7000]


def test_a_corrupt_archive_is_refused_and_removed(server: Server, tmp_path: Path) -> None:
    result = download(server, tmp_path / "coco", md5="0" * 32)
    assert result.returncode == 1
    assert "error: tiny: md5 is" in result.stderr
    assert list((tmp_path / "coco").iterdir()) == []
    assert download(server, tmp_path / "coco").returncode == 0


def test_a_dry_run_touches_nothing(server: Server, tmp_path: Path) -> None:
    result = download(server, tmp_path / "coco", "--dry-run")
    assert result.stdout.startswith(f"{server.url}/zips/tiny.zip -> ")
    assert not (tmp_path / "coco").exists()
    assert server.starts == []


def test_cocos_own_archives_are_known(tmp_path: Path) -> None:
    script = str(ROOT / "scripts" / "download_coco.sh")
    listed = subprocess.run(
        [script, "--dry-run", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(listed) == 3
    assert "http://images.cocodataset.org/zips/train2014.zip" in listed[0]
    wrong = subprocess.run(
        [script, "--dry-run", str(tmp_path), "train2015"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert wrong.returncode == 1
    assert "no archive train2015" in wrong.stderr
    assert subprocess.run([script], capture_output=True, check=False).returncode == 2
    assert (
        "resume"
        in subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    )
