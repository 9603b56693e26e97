"""nvJPEG's C interface, against a library that records what it is given."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.photos.gpu.nvjpeg import NvjpegDecoder, NvjpegError

CPU = torch.device("cpu")

# The functions as nvjpeg.h declares them; the real ones need a GPU. Each call writes a line to the
# file RECORD. The call named FAIL answers STATUS. The hardware has ENGINES.
LIBRARY = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
struct Image { unsigned char* channel[4]; size_t pitch[4]; };
static FILE* out(void) { return fopen(getenv("RECORD"), "a"); }
static int done(FILE* file, const char* name) {
    fputs("\n", file); fclose(file);
    const char* fail = getenv("FAIL");
    return fail && !strcmp(fail, name) ? atoi(getenv("STATUS")) : 0;
}
static int made, size;
int nvjpegCreateEx(int backend, void* device, void* pinned, unsigned flags, void** handle) {
    FILE* f = out();
    fprintf(f, "create %d %d %d %u", backend, device != 0, pinned != 0, flags);
    *handle = (void*)0x7000000000001;
    return done(f, "create");
}
int nvjpegGetHardwareDecoderInfo(void* handle, unsigned* engines, unsigned* cores) {
    *engines = atoi(getenv("ENGINES")); *cores = 1;
    return handle == (void*)0x7000000000001 ? 0 : 2;
}
int nvjpegJpegStateCreate(void* handle, void** state) {
    FILE* f = out();
    *state = (void*)(0x7000000000002 + made++);
    fprintf(f, "state %llx", (unsigned long long)handle);
    return done(f, "state");
}
int nvjpegJpegStateDestroy(void* state) {
    FILE* f = out();
    fputs("no state", f);
    return done(f, "");
}
int nvjpegDestroy(void* handle) { FILE* f = out(); fputs("destroy", f); return done(f, ""); }
int nvjpegDecodeBatchedInitialize(void* h, void* s, int count, int threads, int format) {
    FILE* f = out();
    fprintf(f, "initialize %d %d %d", size = count, threads, format);
    return done(f, "initialize");
}
int nvjpegDecodeBatched(void* handle, void* state, const unsigned char* const* data,
                        const size_t* lengths, struct Image* images, void* stream) {
    FILE* f = out();
    fprintf(f, "decode %llx", (unsigned long long)stream);
    int fillers = 0;
    for (int n = 0; n < size; ++n)
        if (lengths[n] > 100) {  // a JPEG, of 32 x 32 pixels
            fillers += data[n][0] == 0xff && data[n][1] == 0xd8 && images[n].pitch[0] == 96
                && images[n].channel[0] && images[n].channel[0] == images[size - 1].channel[0];
        } else
            fprintf(f, " %.*s>%llx,%zu,%d", (int)lengths[n], data[n],
                    (unsigned long long)images[n].channel[0], images[n].pitch[0],
                    images[n].channel[1] != 0);
    fprintf(f, " +%d", fillers);
    return done(f, "decode");
}
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library where NVIDIA's wheel has it."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to build a library")
    folder = tmp_path_factory.mktemp("packages")
    (folder / "nvidia/cu13/lib").mkdir(parents=True)
    (folder / "library.c").write_text(LIBRARY)
    library = folder / "nvidia/cu13/lib/libnvjpeg.so.13"
    subprocess.run(["gcc", "-shared", "-fPIC", folder / "library.c", "-o", library], check=True)
    return folder


Calls = Callable[[], list[str]]


@pytest.fixture
def calls(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the library was called for since this was asked last."""
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    record = tmp_path / "record"
    for name, value in {"RECORD": str(record), "ENGINES": "1"}.items():
        monkeypatch.setenv(name, value)

    def since_then() -> list[str]:
        lines = record.read_text().splitlines() if record.exists() else []
        record.unlink(missing_ok=True)
        return lines

    return since_then


class Batch:
    """Files that the library prints."""

    def __init__(self, *files: bytes) -> None:
        self.memory = [np.frombuffer(file, np.uint8) for file in files]
        self.addresses = np.array([file.ctypes.data for file in self.memory], np.uint64)
        self.lengths = np.array([*map(len, files)], np.uint64)
        self.destinations = np.arange(len(files), dtype=np.uint64) * 16 + np.uint64(1 << 40)
        self.pitches = np.full(len(files), 1920, np.uint64)

    def decode(self, decoder: NvjpegDecoder) -> int:
        given = self.addresses, self.lengths, self.destinations, self.pitches
        return decoder.decode(*given, 0x5555_6666_7777)


def test_a_batch_reaches_the_library_as_its_header_says(calls: Calls) -> None:
    decoder = NvjpegDecoder(CPU)
    assert calls() == []  # handle and state belong to the thread that decodes
    assert Batch(b"one", b"two!").decode(decoder) == 0
    assert calls() == [
        "create 3 0 0 37",
        "state 7000000000001",
        "initialize 32 1 5",
        "decode 555566667777 one>10000000000,1920,0 two!>10000000010,1920,0 +30",
    ]
    assert Batch(b"z").decode(decoder) == 0
    assert calls() == ["decode 555566667777 z>10000000000,1920,0 +31"]
    assert Batch(*[b"x"] * 33).decode(decoder) == 0
    first, second = calls()
    assert first == "initialize 64 1 5"
    assert second.endswith(" +31")
    decoder.close()
    decoder.close()
    assert calls() == ["no state", "destroy"]


@pytest.mark.parametrize("status", [2, 3, 4, 6, 8, 10, 99])
def test_a_bad_file_gives_a_status_and_the_next_batch_a_new_state(
    status: int, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = NvjpegDecoder(CPU)
    with monkeypatch.context() as patch:
        patch.setenv("FAIL", "decode")
        patch.setenv("STATUS", str(status))
        assert Batch(b"bad").decode(decoder) == status
    calls()
    assert Batch(b"good").decode(decoder) == 0
    assert [line.split()[0] for line in calls()] == ["state", "initialize", "decode"]


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("decode", 5, "nvjpegDecodeBatched: no memory"),
        ("create", 7, "nvjpegCreateEx: no such hardware"),
        ("state", 8, "nvjpegJpegStateCreate: internal error"),
        ("initialize", 42, "nvjpegDecodeBatchedInitialize: status 42"),
    ],
)
def test_a_failure_that_is_no_files_fault_is_an_error_of_one_line(
    name: str, status: int, message: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", name)
    monkeypatch.setenv("STATUS", str(status))
    decoder = NvjpegDecoder(CPU)
    with pytest.raises(NvjpegError, match=f"^{message}$"):
        Batch(b"one").decode(decoder)
    decoder.close()


def test_a_gpu_without_the_hardware_is_named(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINES", "0")
    decoder = NvjpegDecoder(CPU)
    for _ in range(2):
        with pytest.raises(NvjpegError, match=r"^cpu has no decoder for JPEGs$"):
            Batch(b"one").decode(decoder)
        assert calls() == ["create 3 0 0 37", "destroy"]


@pytest.mark.parametrize(
    ("version", "message"),
    [("13.0", r"not installed; pip install 'cap\[gpu\]'"), (None, "PyTorch is built without CUDA")],
)
def test_a_missing_library_says_what_brings_it(
    version: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(path: str) -> None:
        raise OSError(path)

    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr("ctypes.CDLL", missing)
    with pytest.raises(NvjpegError, match=message):
        NvjpegDecoder(CPU)


@pytest.mark.parametrize(("version", "first"), [("13.0", "13"), ("12.8", "12")])
def test_the_library_of_pytorchs_cuda_is_tried_first(
    version: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def missing(path: str) -> None:
        tried.append(path)
        raise OSError(path)

    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr("ctypes.CDLL", missing)
    with pytest.raises(NvjpegError):
        NvjpegDecoder(CPU)
    assert tried[0].endswith(f"libnvjpeg.so.{first}")
    assert {"libnvjpeg.so.12", "libnvjpeg.so.13"} <= {*tried}
