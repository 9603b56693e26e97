"""Freed memory is reused: counted in page faults, which do not depend on the machine's load."""

from __future__ import annotations

import subprocess
import sys

import pytest

_COUNT = """
import resource, torch
from train.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(12 << 20), torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual, done = faults(), keep_freed_memory()
faults()
kept, undone = faults(), keep_freed_memory(False)
print(int(done and undone), usual, kept, faults())
"""


def test_large_blocks_are_not_mapped_anew_while_freed_memory_is_kept() -> None:
    # In a process of its own, because memory that other tests have freed would count.
    run = subprocess.run(
        [sys.executable, "-c", _COUNT], capture_output=True, text=True, check=True, timeout=120
    )
    done, usual, kept, again = map(int, run.stdout.split())
    if not done:
        pytest.skip("no glibc")
    assert kept < usual / 20
    assert again > kept * 5
