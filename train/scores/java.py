"""Runs the Java programs that come with pycocoevalcap: its tokenizer and METEOR."""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import IO

TIMEOUT_S = 600.0
UTF_8 = ("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")


def has_java() -> bool:
    return shutil.which("java") is not None


@cache
def package_folder() -> Path:
    """The folder of pycocoevalcap and its jars."""
    import pycocoevalcap.bleu.bleu

    return Path(pycocoevalcap.bleu.bleu.__file__).parent.parent


def run_java(arguments: Sequence[str], lines: Sequence[str], folder: Path) -> list[str]:
    """Run a Java program with lines of text as its input. Returns its lines of output.

    Raises OSError or SubprocessError.
    """
    result = subprocess.run(
        ["java", *UTF_8, *arguments],
        input="".join(line + "\n" for line in lines),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        cwd=folder,
        timeout=TIMEOUT_S,
        check=True,
    )
    output = result.stdout.split("\n")
    return output[:-1] if output[-1] == "" else output


def write_lines(stream: IO[str], lines: Sequence[str]) -> None:
    with contextlib.suppress(OSError):  # if the program has ended, whoever reads from it notices
        stream.writelines(line + "\n" for line in lines)
        stream.flush()


def failure_reason(error: Exception) -> str:
    """Why a Java program failed, in a few words."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line.strip() for line in str(error.stderr).splitlines() if line.strip()]
        # Programs also print progress on stderr, so prefer the line with the exception.
        lines = [line for line in lines if re.search(r"\.\w+(Exception|Error)\b", line)] or lines
        return (lines[0] if lines else f"exit code {error.returncode}")[:160]
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer in {error.timeout:.0f} s"
    return (str(error) or type(error).__name__).splitlines()[0][:160]
