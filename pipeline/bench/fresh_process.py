"""Starting `cap` as a process of its own, to measure it from the prompt on."""

from __future__ import annotations

import os
import subprocess
import sys


def start_cap(*arguments: object) -> subprocess.Popen[str]:
    """Start `cap` in a new interpreter that imports the same modules as this one.

    Its output and its errors are pipes of text.
    """
    return start_python("from pipeline.cli.main import main; main()", *arguments)


def start_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """`start_cap` with other code than the command's own."""
    return subprocess.Popen(
        # -P keeps files in the working folder from being imported instead.
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        text=True,
    )
