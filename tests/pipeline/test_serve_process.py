"""The server as a process: under load, under attack, told to stop, and in a browser."""

from __future__ import annotations

import base64
import contextlib
import json
import resource
import shutil
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.captioner.captioner import Captioner
from tests.pipeline.serving import Server, small_model, started, wait_for

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

MAX_BYTES = 300_000
_COMMAND = "from pipeline.cli.main import main; main()"
# A server that loses its patience sooner than by default.
_IMPATIENT = """
import sys
from pathlib import Path
from pipeline.captioner.captioner import Captioner
from pipeline.captioner.serve.config import Limits, ServeConfig
from pipeline.captioner.serve.server import bind, serve
config, path = ServeConfig(port=0, max_bytes=int(sys.argv[2])), Path(sys.argv[1])
limits = Limits(header_s=0.3, body_grace_s=0.3, connections=100, linger_s=0.3)
captioner = Captioner.load(path, device="cpu", max_length=6)
say = lambda address: print("started:", address, flush=True)
serve(captioner, config, bind(config), model=path, started=say, limits=limits)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


@contextlib.contextmanager
def cap_serve(model: Path, *options: object) -> Iterator[Server]:
    arguments = ("serve", "--model", model, "--port", 0, "--device", "cpu", "--max-length", 6)
    with started(_COMMAND, *arguments, *options) as server:
        yield server


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with cap_serve(model, "--max-bytes", MAX_BYTES, "--batch", 4, "--json") as running:
        yield running
        assert running.process.poll() is None  # whatever the tests have done to it
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(30) == 0


@pytest.fixture(scope="module")
def impatient(model: Path) -> Iterator[Server]:
    with started(_IMPATIENT, model, MAX_BYTES) as running:
        yield running
        assert running.process.poll() is None


def test_two_hundred_requests_eight_at_a_time_are_all_answered(
    server: Server, model: Path, photos: Path
) -> None:
    files = [photo.read_bytes() for photo in sorted(photos.glob("[a-d]*.jpg"))]
    captioner = Captioner.load(model, device="cpu", max_length=6)
    expected = [prediction.caption for prediction in captioner.caption(files)]
    assert len(set(expected)) > 1
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(server.caption, files * 50))
    assert [status for status, _ in answers] == [200] * 200
    assert [found["caption"] for _, found in answers] == expected * 50
    assert max(found["batch"] for _, found in answers) > 1


def test_the_command_prints_where_it_answers(server: Server, model: Path) -> None:
    assert json.loads(server.said) == {"model": str(model), "address": server.address}


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


def head(length: str, path: str = "/caption") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\n{length}\r\n\r\n"
    ).encode()


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65_536):
            received += piece
    return received


@pytest.mark.parametrize("announced", [True, False])
def test_two_gigabytes_are_refused_while_they_come(impatient: Server, announced: bool) -> None:
    """By a client that sends on without looking at the answer, as most do."""
    before = impatient.peak_mb()
    length = "Content-Length: 2147483648" if announced else "Transfer-Encoding: chunked"
    piece = bytes(1 << 20) if announced else b"100000\r\n" + bytes(1 << 20) + b"\r\n"
    with connect(impatient) as connection:
        connection.sendall(head(length))
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 1 << 31:
                connection.sendall(piece)
                sent += 1 << 20
        assert sent < 1 << 31
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"too large: a photo may have 300,000 bytes" in answer
    assert impatient.peak_mb() - before < 50
    assert impatient.ask("/healthz") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"", b""),
        (b"GET /about HT", b""),
        (b"GET /about HTTP/1.1\r\nHost: localhost\r\nX: ", b""),
        (head("Content-Length: 1000"), b"HTTP/1.1 408 "),
        (head("Content-Length: 1000") + bytes(999), b"HTTP/1.1 408 "),
        (b"\x16\x03\x01\x02\x00\x01", b"HTTP/1.1 400 "),
        (b"GET /" + b"a" * 100_000, b"HTTP/1.1 400 "),
        (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 4"),
        (head("Content-Length: 5\r\nContent-Length: 6"), b"HTTP/1.1 400 "),
    ],
    ids=[
        "silent",
        "cut",
        "slow head",
        "slow body",
        "last byte",
        "tls",
        "long",
        "no host",
        "lengths",
    ],
)
def test_slow_and_malformed_requests_end(impatient: Server, sent: bytes, answered: bytes) -> None:
    with connect(impatient) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        answer = read_all(connection)  # ends, because the server closes the connection
    assert answer.startswith(answered)
    assert bool(answer) == bool(answered)
    assert impatient.ask("/healthz")[0] == 200


def test_a_thousand_open_connections_leave_room_for_others(server: Server, photos: Path) -> None:
    photo = (photos / "a.jpg").read_bytes()
    files = Path(f"/proc/{server.process.pid}/fd")
    before = len(list(files.iterdir()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    try:
        with contextlib.ExitStack() as stack:
            for number in range(1000):
                connection = stack.enter_context(connect(server))
                with contextlib.suppress(ConnectionError):
                    connection.sendall((b"", b"GET", b"", head("Content-Length: 9"))[number % 4])
                if number % 250 == 249:
                    wait_for(lambda: server.ask("/healthz")[0] == 200)
            assert len(list(files.iterdir())) < before + 300
        wait_for(lambda: server.caption(photo)[0] == 200)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def lets_in(server: Server) -> bool:
    try:
        connect(server).close()
    except ConnectionError:
        return False
    return True


def test_a_server_that_is_told_to_stop_answers_what_has_begun_and_ends_well(
    model: Path, photos: Path
) -> None:
    photo = (photos / "a.jpg").read_bytes()
    with cap_serve(model) as server, connect(server) as idle, connect(server) as begun:
        begun.sendall(head(f"Content-Length: {len(photo)}") + photo[:100])
        wait_for(lambda: "\ncap_photos_in_progress 1\n" in server.ask("/metrics")[1])
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not lets_in(server))
        # What had come just before the signal is answered, too.
        begun.sendall(photo[100:])
        answer = read_all(begun)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b'"caption":"' in answer
        assert read_all(idle) == b""
        assert server.process.wait(30) == 0
        assert server.said == f"{model}: {server.address}\n"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    program = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium with chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        "--disable-background-networking",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    running = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield running
    finally:
        running.quit()


_GIVE = """
const bytes = Uint8Array.from(atob(arguments[0]), (c) => c.charCodeAt(0));
const files = new DataTransfer();
files.items.add(new File([bytes], arguments[1], { type: "image/jpeg" }));
const event = arguments[2] === "paste"
  ? new ClipboardEvent("paste", { clipboardData: files, bubbles: true, cancelable: true })
  : new DragEvent("drop", { dataTransfer: files, bubbles: true, cancelable: true });
document.body.dispatchEvent(event);
"""


def test_the_page_captions_photos_that_are_chosen_dropped_and_pasted(
    server: Server, browser: Any, photos: Path, tmp_path: Path
) -> None:
    markup = "<img src=x onerror='window.hacked=1'>.jpg"
    shutil.copy(photos / "b.jpg", tmp_path / markup)
    (tmp_path / "large.jpg").write_bytes(bytes(MAX_BYTES + 1))

    def texts(selector: str) -> list[str]:
        code = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        return browser.execute_script(code, selector)  # type: ignore[no-any-return]

    def cards(count: int) -> None:
        done = "return document.querySelectorAll('.card:not(.busy)').length"
        wait_for(lambda: browser.execute_script(done) == count)

    browser.get(server.address + "/")
    chosen = [photos / "a.jpg", tmp_path / markup, photos / "e.jpg", tmp_path / "large.jpg"]
    wait_for(lambda: "300 kB" in texts("#limits")[0])
    browser.find_element("id", "choose").send_keys("\n".join(map(str, chosen)))
    cards(4)
    _, first = server.caption((photos / "a.jpg").read_bytes())
    _, second = server.caption((photos / "b.jpg").read_bytes())
    assert texts(".caption") == [first["caption"], second["caption"], "", ""]
    assert texts(".name") == ["a.jpg", markup, "e.jpg", "large.jpg"]
    assert texts(".card:first-child .others li span:first-child") == [
        caption["caption"] for caption in first["captions"][1:]
    ]
    assert len(first["captions"]) > 1
    assert texts(".error")[2:] == [
        "No caption: not an image, or of an unknown format.",
        "No caption: too large: 301 kB; a photo may have 300 kB.",
    ]
    parts = texts(".card:first-child .parts")[0]
    assert all(f"{part} " in parts for part in ("upload", "decode", "wait", "encode", "search"))
    for number, way in enumerate(("drop", "paste"), 5):
        data = base64.b64encode((photos / "c.jpg").read_bytes()).decode()
        browser.execute_script(_GIVE, data, f"{way}.jpg", way)
        cards(number)
        assert texts(".name")[0] == f"{way}.jpg"
        assert texts(".caption")[0] == server.caption((photos / "c.jpg").read_bytes())[1]["caption"]
    assert browser.execute_script("return window.hacked") is None
    assert browser.find_element("css selector", ".card:first-child img").is_displayed()
    said = [entry["message"] for entry in browser.get_log("browser")]
    assert [line for line in said if "422" not in line] == []  # the one photo that is none

    browser.get(server.address + "/docs")
    wait_for(lambda: "POST /caption" in texts("h3"))
    assert texts("#curl") == [f"curl -F file=@photo.jpg {server.address}/caption"]
    assert browser.get_log("browser") == []
