"""The server's answers, within this process: captions, refusals, limits, pages."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import sys
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline.captioner.captioner import Captioner
from pipeline.captioner.predictions import Prediction
from tests.pipeline.serving import small_model
from tests.pipeline.test_cli import cap
from train.config import SearchConfig

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")

from pipeline.captioner.serve.app import Served  # noqa: E402
from pipeline.captioner.serve.config import Limits, ServeConfig  # noqa: E402
from pipeline.captioner.serve.refusal import STATUS, Refusal  # noqa: E402
from pipeline.captioner.serve.upload import Body, BodyBudget, Upload, read_upload  # noqa: E402

SMALL = ServeConfig(batch=4, max_bytes=50_000, max_pixels=100_000)
FORM = b"--x\r\n%s\r\n\r\n%s\r\n--x--\r\n"
DISPOSITION = b'Content-Disposition: form-data; name="file"; filename="a.jpg"'
FORM_TYPE = {"content-type": "multipart/form-data; boundary=x"}
JPEG_TYPE = {"content-type": "image/jpeg"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def captioner(run: Path) -> Captioner:
    return Captioner.load(run, device="cpu", others=2, max_length=6)


@pytest.fixture
def photo(photos: Path) -> bytes:
    return (photos / "a.jpg").read_bytes()


@contextlib.asynccontextmanager
async def asking(served: Served) -> AsyncIterator[Any]:
    """A client of a server that is not listening anywhere."""
    served.batcher.start()
    transport = httpx.ASGITransport(served.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
    await served.batcher.stop()


def asked(
    captioner: Captioner,
    questions: Callable[[Any, Served], Coroutine[Any, Any, Any]],
    config: ServeConfig = SMALL,
    limits: Limits | None = None,
) -> Any:
    """What `questions(client, server)` returns."""

    async def ask() -> Any:
        served = Served(captioner, config, name="run", limits=limits)
        async with asking(served) as client, asyncio.timeout(60):
            return await questions(client, served)

    return asyncio.run(ask())


async def send(client: Any, photo: bytes, name: str = "a.jpg") -> Any:
    return await client.post("/caption", files={"file": (name, photo)})


async def post_to(
    served: Served, content_type: bytes, receive: Any, told: Callable[[], None] = lambda: None
) -> list[Any]:
    """The messages of the answer to a request whose body is what `receive` gives. told: is called
    at each of them.
    """
    answers: list[Any] = []

    async def answer(message: Any) -> None:
        answers.append(message)
        told()

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/caption",
        "raw_path": b"/caption",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", content_type)],
    }
    await served.app(scope, receive, answer)
    return answers


def same(answer: dict[str, Any], prediction: Prediction) -> bool:
    score = answer["score"] == pytest.approx(prediction.score, abs=1e-3)
    return bool(score) and answer["caption"] == prediction.caption


@pytest.mark.parametrize(
    "search",
    [SearchConfig(), SearchConfig(sample=True, captions=2, seed=3)],
    ids=["beam", "sample"],
)
def test_requests_at_once_form_batches_and_get_the_captions_of_the_captioner_alone(
    run: Path, photos: Path, search: SearchConfig
) -> None:
    captioner = Captioner.load(run, device="cpu", search_config=search, others=2)
    files = [photo.read_bytes() for photo in sorted(photos.glob("[a-d]*.jpg"))] * 3
    alone = [captioner.caption(photo)[0] for photo in files]
    assert len({prediction.caption for prediction in alone}) > 1

    async def questions(client: Any, served: Served) -> tuple[list[Any], str]:
        answers = await asyncio.gather(*(send(client, photo) for photo in files))
        return [answer.json() for answer in answers], (await client.get("/metrics")).text

    answers, metrics = asked(captioner, questions)
    for answer, prediction in zip(answers, alone, strict=True):
        assert same(answer, prediction)
        expected = (*prediction.captions, *prediction.others)
        assert [c["caption"] for c in answer["captions"]] == [c.caption for c in expected]
        assert len(expected) > 1
        assert set(answer["timing_ms"]) == {
            *("upload", "decode", "wait", "encode", "search", "total")
        }
    assert max(answer["batch"] for answer in answers) == 4
    batches = int(re.findall(r"^cap_batches_total (\d+)$", metrics, re.MULTILINE)[0])
    assert 3 <= batches < 12
    assert "\ncap_photos_total 12\n" in metrics
    assert '\ncap_request_seconds_bucket{le="+Inf"} 12\n' in metrics
    assert "\ncap_body_bytes 0\n" in metrics
    assert "\ncap_photos_in_progress 0\n" in metrics


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "<img src=x onerror=alert(1)>.jpg", "犬 \U0001f415.jpg", "a" * 300]
)
def test_a_files_name_comes_back_and_means_nothing(
    captioner: Captioner, photo: bytes, name: str
) -> None:
    async def questions(client: Any, served: Served) -> Any:
        return await send(client, photo, name)

    answer = asked(captioner, questions)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.json()["name"] == name[:255]
    assert same(answer.json(), captioner.caption(photo)[0])


def test_the_bytes_alone_are_a_request_too(captioner: Captioner, photo: bytes) -> None:
    async def questions(client: Any, served: Served) -> Any:
        return await client.post("/caption", content=photo, headers=JPEG_TYPE)

    assert same(asked(captioner, questions).json(), captioner.caption(photo)[0])


@pytest.mark.parametrize(
    ("headers", "body", "status", "reason"),
    [
        ({"content-type": "application/json"}, b"{}", 415, "not a photo's content type"),
        ({}, b"\xff\xd8", 415, "not a photo's content type"),
        (JPEG_TYPE, b"", 422, "the file is empty"),
        (JPEG_TYPE, b"this is no photo", 422, "not an image, or of an unknown format"),
        (FORM_TYPE, FORM % (DISPOSITION, b"no photo"), 422, "not an image"),
        (FORM_TYPE, FORM % (DISPOSITION.replace(b"file", b"x"), b""), 400, "has no photo"),
        (FORM_TYPE, (FORM % (DISPOSITION, b"cut"))[:-5], 400, "the form has no end"),
        (FORM_TYPE, b"not a form", 400, "the form cannot be read"),
        (FORM_TYPE, b"", 400, "the form has no end"),
        ({"content-type": "multipart/form-data"}, b"", 400, "the form has no boundary"),
        (FORM_TYPE, (FORM % (DISPOSITION, b"1"))[:-7] * 2, 400, "several photos"),
        (FORM_TYPE, b"--x\r\na: b\r\n\r\n\r\n" * 17, 400, "more than 16 parts"),
        (FORM_TYPE, b"--x\r\n" + b"a" * 20_000, 400, "the form "),
    ],
)
def test_what_is_no_photo_is_refused_with_a_reason(
    captioner: Captioner, headers: dict[str, str], body: bytes, status: int, reason: str
) -> None:
    async def questions(client: Any, served: Served) -> tuple[Any, Any]:
        answer = await client.post("/caption", content=body, headers=headers)
        return answer, (await client.get("/healthz")).json()

    answer, health = asked(captioner, questions)
    assert (answer.status_code, health) == (status, {"status": "ok"})
    assert reason in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_a_form_is_the_same_however_it_is_cut() -> None:
    data = bytes(range(256)) + b"\r\n--\r\n-x\r\n--y" * 3
    form = FORM % (DISPOSITION, data)

    async def upload(size: int) -> Upload:
        pieces = iter([form[i : i + size] for i in range(0, len(form), size)])
        left = -(-len(form) // size)

        async def receive() -> dict[str, Any]:
            nonlocal left
            left -= 1
            return {"type": "http.request", "body": next(pieces), "more_body": left > 0}

        budget = BodyBudget(10**6)
        with Body(receive, budget, Limits()) as body:
            headers = [(b"content-type", FORM_TYPE["content-type"].encode())]
            found = await read_upload(body, headers, 10**6)
            assert budget.used_bytes == len(form)
        assert budget.used_bytes == 0
        return found

    for size in (1, 2, 7, 100, len(form)):
        assert asyncio.run(upload(size)) == Upload(data, "a.jpg")


@pytest.mark.parametrize("form", [True, False])
@pytest.mark.parametrize("announced", [True, False])
def test_a_file_may_have_so_many_bytes_and_not_one_more(
    captioner: Captioner, photo: bytes, form: bool, announced: bool
) -> None:
    async def questions(client: Any, served: Served) -> list[int]:
        found = []
        for size in (50_000, 50_001, 200_000):
            data = photo.ljust(size, b"\0")  # a JPEG ends before what follows it
            body = FORM % (DISPOSITION, data) if form else data

            async def pieces(body: bytes = body) -> AsyncIterator[bytes]:
                for start in range(0, len(body), 10_000):
                    yield body[start : start + 10_000]

            answer = await client.post(
                "/caption",
                content=body if announced else pieces(),
                headers=FORM_TYPE if form else JPEG_TYPE,
            )
            found.append(answer.status_code)
        return found

    assert asked(captioner, questions) == [200, 413, 413]


def test_a_refused_body_is_not_read_to_its_end(captioner: Captioner) -> None:
    """Of two gigabytes, read for no longer than it takes to see the answer."""
    sent = 0
    sent_at: list[int] = []

    async def questions(client: Any, served: Served) -> tuple[list[Any], int]:
        async def receive() -> dict[str, Any]:
            nonlocal sent
            sent += 65_536
            await asyncio.sleep(0.001)
            return {"type": "http.request", "body": bytes(65_536), "more_body": True}

        answers = await post_to(served, b"image/png", receive, lambda: sent_at.append(sent))
        return answers, served._budget.used_bytes

    answers, used = asked(captioner, questions, limits=Limits(linger_s=0.2))
    assert answers[0]["status"] == 413
    assert (b"connection", b"close") in answers[0]["headers"]
    assert [answer.get("more_body") for answer in answers] == [None, True, None]
    assert (used, sent < 1 << 30) == (0, True)
    start, whole, end = sent_at
    assert start == whole == 65_536
    assert end > whole  # after the answer, for those who send on before they look at it


def test_too_many_pixels_are_not_decoded(
    captioner: Captioner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (400, 250)).save(tmp_path / "most.png")
    Image.new("RGB", (401, 250)).save(tmp_path / "more.png")
    png = (tmp_path / "more.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + png[24:29]
    bomb = png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    (tmp_path / "bomb.png").write_bytes(bomb)
    decoded: list[int] = []
    decode = captioner.decode

    def noted(data: Any) -> Any:
        decoded.append(len(data))
        return decode(data)

    monkeypatch.setattr(captioner, "decode", noted)

    async def questions(client: Any, served: Served) -> list[Any]:
        files = [(tmp_path / f"{name}.png").read_bytes() for name in ("most", "more", "bomb")]
        return [await send(client, photo) for photo in files]

    most, more, bombed = asked(captioner, questions)
    assert (most.status_code, len(decoded)) == (200, 1)
    assert more.status_code == bombed.status_code == 413
    assert more.json() == {"error": "too large: 401×250 pixels; at most 100,000 pixels are taken"}
    assert bombed.json() == {"error": "too large (a decompression bomb)"}


@pytest.fixture
def held(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The networks compute nothing before this is set."""
    go = threading.Event()
    compute = captioner.caption_decoded

    def wait(*arguments: Any) -> Any:
        assert go.wait(30)
        return compute(*arguments)

    monkeypatch.setattr(captioner, "caption_decoded", wait)
    return go


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_full_queue_says_come_later_and_the_server_stays_well(
    captioner: Captioner, photo: bytes, held: threading.Event
) -> None:
    async def questions(client: Any, served: Served) -> tuple[Any, Any, list[Any], str]:
        sent = [asyncio.create_task(send(client, photo)) for _ in range(6)]
        await until(lambda: served._photos == 6)
        refused, health = await send(client, photo), await client.get("/healthz")
        held.set()
        answers = await asyncio.gather(*sent)
        assert (await client.head("/healthz")).status_code == 200
        return refused, health, answers, (await client.get("/metrics")).text

    refused, health, answers, metrics = asked(captioner, questions, replace(SMALL, queue=6))
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"].startswith("6 photos wait already")
    assert health.status_code == 200
    assert [answer.status_code for answer in answers] == [200] * 6
    assert '\ncap_refused_total{reason="busy"} 1\n' in metrics


def test_uploads_have_so_much_memory_and_no_more(
    captioner: Captioner, photo: bytes, held: threading.Event
) -> None:
    async def questions(client: Any, served: Served) -> tuple[Any, Any]:
        large = photo.ljust(45_000, b"\0")
        sent = [asyncio.create_task(send(client, large)) for _ in range(2)]
        await until(lambda: served._budget.used_bytes > 90_000)
        refused = await send(client, large)
        held.set()
        await asyncio.gather(*sent)
        return refused, await send(client, large)

    refused, later = asked(captioner, questions, limits=Limits(body_bytes=100_000))
    assert (refused.status_code, later.status_code) == (503, 200)
    assert "too many photos are arriving" in refused.json()["error"]


def test_a_client_that_leaves_costs_no_computation(
    captioner: Captioner, photo: bytes, held: threading.Event
) -> None:
    async def questions(client: Any, served: Served) -> str:
        first = asyncio.create_task(send(client, photo))
        await until(lambda: served._photos == 1 and not served.batcher.waiting)
        await asyncio.sleep(0.05)  # the networks have it, and wait
        messages = [{"type": "http.request", "body": photo, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await until(lambda: served.batcher.waiting == 1)
            return {"type": "http.disconnect"}

        await post_to(served, b"image/jpeg", receive)
        assert served.batcher.waiting == 0
        held.set()
        assert (await first).status_code == 200
        return (await client.get("/metrics")).text  # type: ignore[no-any-return]

    metrics = asked(captioner, questions)
    assert '\ncap_refused_total{reason="left"} 1\n' in metrics
    assert "\ncap_photos_total 1\n" in metrics


def test_a_body_that_does_not_come_is_given_up() -> None:
    async def read(pieces: list[bytes]) -> None:
        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0 if pieces else 30)
            return {"type": "http.request", "body": pieces.pop(0), "more_body": True}

        limits = Limits(body_grace_s=0.05, body_bytes_per_s=10_000)
        with Body(receive, BodyBudget(10**6), limits) as body:
            await read_upload(body, [(b"content-type", b"image/png")], 10**6)

    with pytest.raises(Refusal, match="came too slowly: 0 bytes in 0 s") as refused:
        asyncio.run(read([]))
    assert STATUS[refused.value.reason] == 408
    with pytest.raises(Refusal, match="came too slowly: 9,500 bytes in 1 s"):
        asyncio.run(read([bytes(9_500)]))


def test_networks_that_fail_cost_their_batch_and_are_told_by_the_health(
    captioner: Captioner, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def questions(client: Any, served: Served) -> list[Any]:
        with monkeypatch.context() as patch:
            patch.setattr(captioner, "caption_decoded", lambda *_: 1 / 0)
            found = [await send(client, photo), await client.get("/healthz")]
        return [*found, await send(client, photo), await client.get("/healthz")]

    failed, failing, answer, well = asked(captioner, questions)
    assert failed.json() == {"error": "the server failed; its log says why"}
    assert [r.status_code for r in (failed, failing, answer, well)] == [500, 503, 200, 200]


def test_probabilities_that_are_nan_are_an_answer_of_500(run: Path, photo: bytes) -> None:
    whole = Captioner.load(run, device="cpu")
    with torch.no_grad():
        whole.bundle.decoder.head.weight.fill_(float("nan"))
    broken = Captioner(whole.bundle, whole.encoder, whole.search_config)

    async def questions(client: Any, served: Served) -> Any:
        return await send(client, photo)

    answer = asked(broken, questions)
    assert answer.status_code == 500
    assert "not finite" in answer.json()["error"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:8000"}, 200),
        ({"host": "LOCALHOST."}, 200),
        ({"host": "127.0.0.1:80"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "192.168.1.5"}, 200),
        ({"host": "photos.example"}, 200),
        ({"host": "evil.example"}, 421),
        ({"host": "localhost.evil.example"}, 421),
        ({"host": "evil.example:127.0.0.1"}, 421),
        ({"host": ""}, 421),
        ({"host": "[::1].evil.example"}, 421),
        ({"origin": "http://localhost"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://localhost:1"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_other_sites_cannot_ask(captioner: Captioner, headers: dict[str, str], status: int) -> None:
    async def questions(client: Any, served: Served) -> Any:
        return await client.get("/about", headers=headers)

    answer = asked(captioner, questions, replace(SMALL, allow_host=("photos.example",)))
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers
    assert "default-src 'none'" in answer.headers["content-security-policy"]


PATHS = ("/", "/page.css", "/page.js", "/docs", "/docs.js", "/icon.svg")


def test_the_pages_load_nothing_from_elsewhere_and_have_no_code_of_their_own(
    captioner: Captioner,
) -> None:
    async def questions(client: Any, served: Served) -> dict[str, Any]:
        return {path: await client.get(path) for path in PATHS}

    pages = asked(captioner, questions)
    for path, page in pages.items():
        assert page.status_code == 200, path
        assert "unsafe" not in page.headers["content-security-policy"]
        text = page.text.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?:|//[a-z]+\.", text.replace("// ", "")), path
        assert not re.search(r"style=|<style|\son\w+=\"|<script(?! src=)|javascript:", text), path
        for target in re.findall(r'(?:src|href)="([^"]+)"', page.text):
            assert f"/{target.removeprefix('./')}" in (*PATHS, "/openapi.json"), target


@pytest.mark.parametrize(
    "path", ["/page", "/page/page.css", "/..%2fapp.py", "/../app.py", "/etc/passwd", "/best.cap"]
)
def test_no_file_of_the_server_can_be_read(captioner: Captioner, path: str) -> None:
    async def questions(client: Any, served: Served) -> Any:
        return await client.get(path)

    answer = asked(captioner, questions)
    assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})


def test_the_openapi_document_tells_what_is_answered(captioner: Captioner) -> None:
    async def questions(client: Any, served: Served) -> list[Any]:
        return [(await client.get(path)).json() for path in ("/openapi.json", "/about")]

    api, about = asked(captioner, questions)
    assert set(api["paths"]) == {"/caption", "/about", "/healthz", "/metrics"}
    post = api["paths"]["/caption"]["post"]
    assert set(post["requestBody"]["content"]) >= {"multipart/form-data", "image/*"}
    assert {int(status) for status in post["responses"]} == {200, *STATUS.values()}
    assert set(about) == set(api["components"]["schemas"]["About"]["properties"])
    assert (about["model"], about["max_bytes"]) == ("run", 50_000)


def test_metrics_are_in_prometheus_form(captioner: Captioner, photo: bytes) -> None:
    async def questions(client: Any, served: Served) -> Any:
        await send(client, photo)
        await send(client, b"")
        return await client.get("/metrics")

    answer = asked(captioner, questions)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    described = set()
    for line in answer.text.splitlines():
        if line.startswith("# "):
            described.add(line.split()[2])
            continue
        found = re.fullmatch(r'(\w+)(\{\w+="[^"]+"\})? [0-9.e+-]+', line)
        assert found, line
        assert re.sub(r"_(bucket|sum|count)$", "", found[1]) in described
    assert '\ncap_refused_total{reason="not_a_photo"} 1\n' in answer.text


def test_warming_up_leaves_no_doubt_behind(captioner: Captioner) -> None:
    said = len(captioner._said)
    Served(captioner, SMALL, name="run").batcher.warm_up()
    assert len(captioner._said) == said


def test_what_cannot_start_is_one_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        _, err = cap("serve", "--model", run, "--port", port, "--device", "cpu", code=1)
    assert err == (
        f"error: 127.0.0.1 port {port}: Address already in use; use another --port, or --port 0 "
        "for a free one\n"
    )
    _, err = cap("serve", "--model", tmp_path / "absent", "--port", 0, code=1)
    assert err == f"error: {tmp_path}/absent: not found\n"
    _, err = cap("serve", "--model", run, "--port", 0, "--host", "no such name", code=1)
    assert err.startswith("error: no such name: cannot listen there (")
    assert err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    _, err = cap("serve", "--model", run, code=1)
    assert err == (
        "error: cap serve needs FastAPI, uvicorn and python-multipart; get them with "
        "`pip install 'cap[serve]'`\n"
    )


def test_decoded_photos_get_the_predictions_of_their_files(
    captioner: Captioner, photos: Path
) -> None:
    paths = [photos / f"{name}.jpg" for name in "abc"]
    read = [captioner.decode(path) for path in paths]
    pixels = torch.stack([each.pixels for each in read if each.pixels is not None])
    timed = captioner.caption_decoded([str(path) for path in paths], pixels)
    assert timed.predictions == captioner.caption(paths)
    assert timed.encode_s > 0
    assert timed.search_s > 0
    assert captioner.decode(photos / "e.jpg").error
