"""A small model, and servers of it in processes of their own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.encoder.encoder import Encoder
from pipeline.encoder.weights import load_backbone
from tests.conftest import ROOT
from train.captions.vocabulary import SPECIALS, Vocabulary
from train.model.bundle import Bundle
from train.model.decoder import CaptionDecoder, DecoderConfig

_WORDS = ("a", "dog", "cat", "runs", "sits", "on", "under", "the", "red", "house", "hill")


def small_model(folder: Path) -> Path:
    """A model that has learned nothing, but says something else of each photo."""
    network = load_backbone("resnet18", "random")
    torch.save(network.network.state_dict(), folder / "weights.pth")
    network = load_backbone("resnet18", str(folder / "weights.pth"))
    encoder = Encoder(network, device=torch.device("cpu"), precision="float32", image_size=64)
    torch.manual_seed(0)
    words = len(SPECIALS) + len(_WORDS)
    config = DecoderConfig(
        feature_dim=network.feature_dim, vocab_size=words, embedding_size=16, hidden_size=32
    )
    decoder = CaptionDecoder(config).eval()
    with torch.no_grad():
        decoder.head.weight.mul_(20)
    vocabulary = Vocabulary(_WORDS, (4,) * len(_WORDS), min_count=4)
    Bundle(decoder, vocabulary, encoder.record, {}).save(folder / "small.cap")
    return folder / "small.cap"


@dataclass
class Server:
    """A server that runs."""

    process: subprocess.Popen[str]
    port: int
    address: str
    said: str  # the line on standard output

    def ask(self, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
        """(status, JSON or text) of a GET, or of a POST if there is a body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            method = "POST" if body else "GET"
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body or None, named)
            answer = connection.getresponse()
            text = answer.read().decode()
            kind = answer.headers["content-type"]
            return answer.status, json.loads(text) if kind == "application/json" else text

    def caption(self, photo: bytes) -> tuple[int, Any]:
        return self.ask("/caption", photo, content_type="image/jpeg")

    def peak_mb(self) -> float:
        """The most memory that the process has had, in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1000


@contextlib.contextmanager
def started(code: str, *arguments: object) -> Iterator[Server]:
    """A process of this Python code, which serves and prints the address. It is killed at the end,
    if it still runs.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()  # at its end, if the process ends
            said.seek(0)
            assert "http://127.0.0.1:" in line, said.read()
            address = re.findall(r"http://[0-9.:]+", line)[0]
            yield Server(process, int(address.rpartition(":")[2]), address, line)
        finally:
            process.kill()
            process.communicate()


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    """Wait until a condition holds. Fails if it does not in this time."""
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")
