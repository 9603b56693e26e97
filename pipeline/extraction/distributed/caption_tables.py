"""Tokenizing the captions of a shard by several processes, while its GPU waits.

One process takes a minute for a million photos with five captions each. They are plain processes
that read from a pipe and write to one, so they end when their parent is killed.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from cache.merge import merge_captions
from cache.record import CaptionTable
from train.captions.tokenizer import build_caption_table

_LEAST_CAPTIONS = 20_000  # for a process, which takes half a second to start


def caption_table(
    captions: Sequence[Sequence[str]], tokenizer: str, processes: int
) -> CaptionTable:
    """`build_caption_table`, by up to this many processes if there are many captions.

    Raises TokenizerError.
    """
    count = min(processes, sum(map(len, captions)) // _LEAST_CAPTIONS)
    if count > 1:
        cuts = [len(captions) * part // count for part in range(count + 1)]
        parts = [captions[start:stop] for start, stop in pairwise(cuts)]
        with ThreadPoolExecutor(count) as threads:
            tables = list(threads.map(lambda part: _elsewhere(part, tokenizer), parts))
        found = [table for table in tables if table is not None]
        if len(found) == count:
            return merge_captions(found, [np.ones(len(part), bool) for part in parts])
    return build_caption_table(captions, tokenizer)


def _elsewhere(captions: Sequence[Sequence[str]], tokenizer: str) -> CaptionTable | None:
    """The table, made by another process; None if that fails."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"from {__name__} import main; main()"],
        input=pickle.dumps((captions, tokenizer)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        check=False,
    )
    if done.returncode:
        return None
    table: CaptionTable = pickle.loads(done.stdout)
    return table


def main() -> None:
    """Run such a process."""
    captions, tokenizer = pickle.load(sys.stdin.buffer)
    pickle.dump(build_caption_table(captions, tokenizer), sys.stdout.buffer)
