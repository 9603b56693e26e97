"""`cap predict` of one photo from the prompt, and where its time goes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cache.errors import CapError
from pipeline.bench.fresh_process import start_python
from train.torch_import import share_machine, start_torch

# In the order in which they happen: until Python runs our first line; the imports, PyTorch above
# all; the model and the backbone with its weights; the photo from its file to its caption; the
# process's end.
PARTS = ("interpreter", "imports", "load", "caption", "end")
_STAMPS = "seconds: "  # before the stamps in the child's stderr
_CODE = f"""
import time
started = time.perf_counter()
import pipeline.cli.app
from pipeline.cli.main import main
from {__name__} import run
run(main, started)
"""


def caption_afresh(model: Path, photo: str, beam_size: int, device: str) -> dict[str, float]:
    """The seconds of each of PARTS. Raises CapError if the process prints no caption."""
    options = ("--model", model, "--beam-size", beam_size, "--device", device)
    started = time.perf_counter()
    with start_python(_CODE, "predict", photo, *options) as process:
        out, err = process.communicate()
    ended = time.perf_counter()
    lines = err.strip().splitlines()
    found = [line for line in lines if line.startswith(_STAMPS)]  # a random model's doubt follows
    if process.returncode or not out.startswith(photo) or not found:
        reason = lines[-1] if lines else "it wrote no caption"
        raise CapError(f"a fresh `cap predict` failed ({reason})")
    # The clock is the system's: processes may compare what they read there.
    stamps = [started, *json.loads(found[0].removeprefix(_STAMPS)), ended]
    return {name: stamps[n + 1] - stamps[n] for n, name in enumerate(PARTS)}


def run(main: Callable[[], None], started: float) -> None:
    """Run `cap` with this process's arguments, and tell the times between its parts on stderr.

    main: the command line. It imports nothing more, because all that the command would import is
    imported here in the same order. started: when Python ran the first line, by `perf_counter`.
    """
    share_machine()
    start_torch(sys.argv[sys.argv.index("--device") + 1])
    from pipeline.captioner.captioner import Captioner

    stamps = [started, time.perf_counter()]
    load, stream = Captioner.load, Captioner.stream

    def timed_load(*arguments: Any, **options: Any) -> Captioner:
        captioner = load(*arguments, **options)
        stamps.append(time.perf_counter())
        return captioner

    def timed_stream(self: Captioner, *arguments: Any, **options: Any) -> Iterator[Any]:
        yield from stream(self, *arguments, **options)
        stamps.append(time.perf_counter())
        print(f"{_STAMPS}{json.dumps(stamps)}", file=sys.stderr, flush=True)

    Captioner.load = timed_load  # type: ignore[method-assign]
    Captioner.stream = timed_stream  # type: ignore[method-assign]
    main()
