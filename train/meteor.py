"""METEOR 1.5 (Denkowski and Lavie, 2014), by its Java program's line protocol."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Mapping

from train import java
from train.java import UTF_8, package_folder, write_lines


def meteor(references: Mapping[str, list[str]], hypotheses: Mapping[str, list[str]]) -> float:
    """Corpus METEOR of tokenized captions, one hypothesis an image.

    Raises OSError or ValueError if the program fails or does not answer in time.
    """

    def clean(text: str) -> str:
        return text.replace("|||", " ")

    return _ask(
        [
            " ||| ".join(["SCORE", *map(clean, references[image]), clean(hypotheses[image][0])])
            for image in hypotheses
        ]
    )


def _ask(requests: list[str]) -> float:
    """A line of statistics comes back for each request, then their score."""
    command = ["java", *UTF_8, "-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio"]
    command += ["-l", "en", "-norm"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        cwd=package_folder() / "meteor",
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        killer = threading.Timer(java.TIMEOUT_S, process.kill)
        killer.start()
        # Written from beside: METEOR answers while it reads, and pipes are short.
        writer = threading.Thread(target=write_lines, args=(process.stdin, requests))
        writer.start()
        try:
            statistics = [process.stdout.readline().strip() for _ in requests]
            writer.join()
            if not all(statistics):
                raise ValueError("it stopped")
            write_lines(process.stdin, [" ||| ".join(["EVAL", *statistics])])
            # One score a caption comes back, then the one of the corpus.
            answers = [process.stdout.readline() for _ in range(len(requests) + 1)]
            return float(answers[-1])
        finally:
            killer.cancel()
            process.kill()
            writer.join()
