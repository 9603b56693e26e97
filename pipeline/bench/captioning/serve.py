"""`cap bench serve`: the time from a request to its caption, one at a time and under load.

The server is a `cap serve` of its own process, with a model of COCO's size (see `predict`). Photos
that are sent one by one take turns with a captioner in this process, which gets the same bytes: the
difference is what HTTP costs.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import CapError
from pipeline.bench.captioning.predict import (
    CAPTION_WORDS,
    write_bench_model,
    write_bench_photos,
)
from pipeline.bench.fresh_process import start_cap
from pipeline.bench.machine import Machine, describe_machine
from pipeline.captioner.captioner import Captioner
from train.config import SearchConfig
from train.device import resolve_device

_PARTS = ("upload", "decode", "wait", "encode", "search")
_WARM_UP = 3
_TIMEOUT_S = 120.0
_STOP_S = 20.0


@dataclass(frozen=True)
class Times:
    """Of some requests, in milliseconds as their clients see it."""

    p50_ms: float
    p99_ms: float
    photos_per_s: float
    batch: float  # photos that were captioned together, the mean
    parts_ms: dict[str, float]  # medians, as the server tells them


@dataclass(frozen=True)
class ServeBench:
    """What was measured, with which model and on which machine."""

    backbone: str
    precision: str
    beam_size: int
    photos: int
    requests: int
    clients: int
    lost: int  # requests under load that got no caption
    captioner_p50_ms: float  # one photo from its bytes, without a server
    alone: Times
    load: Times
    machine: Machine

    def table(self) -> str:
        head = "".join(f"{part:>9}" for part in _PARTS)
        lines = [
            f"{self.backbone} in {self.precision}, beam size {self.beam_size}; "
            f"{self.photos} photos one by one, then {self.requests} requests, {self.clients} at a "
            f"time: {self.lost} lost",
            f"{'ms':<14}{'p50':>9}{'p99':>9}{'photos/s':>10}{'batch':>7}{head}",
            f"{'no server':<14}{self.captioner_p50_ms:>9.1f}",
        ]
        for name, times in (("one by one", self.alone), (f"{self.clients} clients", self.load)):
            parts = "".join(f"{times.parts_ms[part]:>9.1f}" for part in _PARTS)
            lines.append(
                f"{name:<14}{times.p50_ms:>9.1f}{times.p99_ms:>9.1f}{times.photos_per_s:>10.1f}"
                f"{times.batch:>7.1f}{parts}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Answer:
    """What a client saw of one request; `found` is None if it got no caption."""

    seconds: float
    found: dict[str, Any] | None


def bench_serve(
    *,
    backbone: str,
    weights: str,
    photos: int,
    requests: int,
    clients: int,
    beam_size: int,
    device: str = "auto",
    progress: Callable[[int, int, float, str], None] = lambda *_: None,
) -> ServeBench:
    """Make a model and photos in a temporary folder, serve them and ask.

    progress: is told how many requests are done and how many there are, 0 for the rate, and what is
    being done. Raises EncoderError, DeviceError, or CapError if the server does not start.
    """
    chosen = resolve_device(device)
    steps = photos + requests
    progress(0, steps, 0, "making a model")
    with tempfile.TemporaryDirectory(prefix="cap-bench-") as folder:
        names = write_bench_photos(Path(folder) / "photos", photos)
        files = [Path(name).read_bytes() for name in names]
        model, precision = write_bench_model(Path(folder), backbone, weights, names, chosen)
        captioner = Captioner.load(
            model,
            device=device,
            search_config=SearchConfig(beam_size=beam_size, max_length=CAPTION_WORDS),
            others=2,
        )
        progress(0, steps, 0, "starting the server")
        with _server(model, beam_size, device) as port:
            for file in files[:_WARM_UP]:
                captioner.caption(file)
                _ask(port, file)
            direct_s: list[float] = []
            alone: list[_Answer] = []
            for done, file in enumerate(files):
                progress(done, steps, 0, "one by one")
                started = time.perf_counter()
                captioner.caption(file)
                direct_s.append(time.perf_counter() - started)
                alone.append(_ask(port, file))
            progress(photos, steps, 0, f"{clients} at a time")
            started = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                turns = (files[number % photos] for number in range(requests))
                load = list(pool.map(lambda file: _ask(port, file), turns))
            load_s = time.perf_counter() - started
    progress(steps, steps, 0, "")
    return ServeBench(
        backbone=backbone,
        precision=precision,
        beam_size=beam_size,
        photos=photos,
        requests=requests,
        clients=clients,
        lost=sum(answer.found is None for answer in load),
        captioner_p50_ms=1000 * statistics.median(direct_s),
        alone=_times(alone, sum(answer.seconds for answer in alone)),
        load=_times(load, load_s),
        machine=describe_machine(chosen),
    )


@contextlib.contextmanager
def _server(model: Path, beam_size: int, device: str) -> Iterator[int]:
    """The port of a server that runs."""
    options = ("--beam-size", beam_size, "--max-length", CAPTION_WORDS, "--device", device)
    process = start_cap("serve", "--model", model, "--port", 0, *options)
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        if not line:
            _, err = process.communicate()
            reason = (err.strip().splitlines() or ["it said nothing"])[-1]
            raise CapError(f"a fresh `cap serve` failed ({reason})")
        yield int(line.rpartition(":")[2])
    finally:
        process.terminate()
        try:
            process.communicate(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _ask(port: int, file: bytes) -> _Answer:
    """Send one photo, over a connection of its own, as a `curl` does."""
    started = time.perf_counter()
    found = None
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("POST", "/caption", file, {"Content-Type": "image/jpeg"})
        answer = connection.getresponse()
        body = answer.read()
        found = json.loads(body) if answer.status == 200 else None
    return _Answer(time.perf_counter() - started, found)


def _times(answers: Sequence[_Answer], total_s: float) -> Times:
    """Raises CapError if none of the requests got a caption."""
    kept = [(answer.seconds, answer.found) for answer in answers if answer.found is not None]
    if not kept:
        raise CapError("the server answers no request")
    seconds = [taken for taken, _ in kept]
    return Times(
        p50_ms=1000 * statistics.median(seconds),
        p99_ms=1000 * float(np.percentile(seconds, 99)),
        photos_per_s=len(kept) / total_s,
        batch=statistics.mean(found["batch"] for _, found in kept),
        parts_ms={
            part: statistics.median(found["timing_ms"][part] for _, found in kept)
            for part in _PARTS
        },
    )
