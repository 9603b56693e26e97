"""Freed memory is reused: counted in page faults, which do not depend on the machine's load."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from train.allocator import without_collections

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


def test_the_collector_rests_and_works_again() -> None:
    @without_collections()
    def work() -> bool:
        return gc.isenabled()

    assert gc.isenabled()
    assert not work()
    assert gc.isenabled()
    with pytest.raises(KeyError), without_collections():
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    assert not work()
    assert not gc.isenabled()
    gc.enable()


def test_freed_blocks_of_a_photo_are_kept() -> None:
    """In a process of its own, whose memory is then not given back."""
    code = """
import ctypes, sys
from train.allocator import keep_small_blocks
done = keep_small_blocks()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def faults(size):
    import resource
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        block = libc.malloc(size)
        ctypes.memset(block, 1, size)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(20 << 20)
print(int(done), faults(20 << 20), faults(40 << 20))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    done, small, large = map(int, run.stdout.split())
    if not done:
        pytest.skip("no glibc")
    assert small < 1000
    assert large > 20 * 40 * 200
