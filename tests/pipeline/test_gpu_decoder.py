"""Decoding on a GPU, with a stand-in for its decoder and its kernels run on the CPU."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pipeline.photos.gpu.decoder import GpuDecoder, JpegFile
from pipeline.photos.gpu.nvjpeg import NvjpegError
from pipeline.photos.jpeg_header import gpu_size, read_header
from pipeline.photos.preprocessing import BILINEAR, empty_pixels, preprocess
from pipeline.photos.views import VIEWS
from tests.gpu_stand_in import StandInDecoder, resize_kernels

CPU = torch.device("cpu")
SIZE = 48


def jpeg(height: int, width: int, **options: object) -> bytes:
    random = np.random.default_rng(height * 1000 + width)
    small = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    file = io.BytesIO()
    settings = {"subsampling": 0, **options}
    Image.fromarray(small).resize((width, height)).save(file, "JPEG", **settings)
    return file.getvalue()


class Photos:
    """Files in memory, as they travel to the decoder."""

    def __init__(self, files: list[bytes]) -> None:
        self.data = files
        self.memory: NDArray[np.uint8] = np.frombuffer(b"".join(files), np.uint8).copy()
        address = self.memory.ctypes.data
        self.files = []
        for place, data in enumerate(files):
            size = gpu_size(read_header(data)) or (64, 64)
            self.files.append(JpegFile(place, address, len(data), *size))
            address += len(data)


def gpu_decoder(
    views: tuple[str, ...] = ("full",), filter: str = BILINEAR, **options: int
) -> tuple[GpuDecoder, StandInDecoder]:
    stand_in = StandInDecoder()
    kernels = resize_kernels()
    made = GpuDecoder(
        CPU, SIZE, views, filter=filter, batch_decoder=stand_in, kernels=kernels, **options
    )
    return made, stand_in


def pixels_for(count: int, views: tuple[str, ...] = ("full",), size: int = SIZE) -> torch.Tensor:
    """(R, V, 3, S, S) as the encoder's input, of a value that no photo has everywhere."""
    return empty_pixels(count * len(views), size).fill_(7).view(count, len(views), 3, size, size)


def assert_decoded(photos: Photos, out: torch.Tensor, views: tuple[str, ...], size: int) -> None:
    for file, data in zip(photos.files, photos.data, strict=True):
        assert torch.equal(out[file.place].cpu(), preprocess(data, size, views))


@pytest.mark.parametrize("views", [("full",), ("center", "flip"), ("full", "top-left")])
def test_photos_have_the_pixels_of_preprocess(views: tuple[str, ...]) -> None:
    photos = Photos(
        [
            jpeg(64, 64),
            jpeg(67, 129),
            jpeg(300, 211, quality=95),
            jpeg(48, 48, restart_marker_blocks=3),
            jpeg(16, 17, optimize=True),
        ]
    )
    decoder, stand_in = gpu_decoder(views)
    out = pixels_for(6, views)
    assert decoder.decode(photos.files, out) == []
    assert_decoded(photos, out, views, SIZE)
    assert (out[5] == 7).all()
    assert stand_in.batches == [5]
    again = pixels_for(6, views)
    moved = [file._replace(place=5 - file.place) for file in photos.files]
    assert decoder.decode(moved, again) == []
    assert torch.equal(again[5], out[0])
    assert decoder.decode([], again) == []
    decoder.close()
    assert stand_in.closed


def test_a_batch_larger_than_a_buffer_goes_round() -> None:
    """In seven groups, through three buffers."""
    photos = Photos([jpeg(40 + n, 50) for n in range(20)])
    bytes_of_three = 3 * 3 * 60 * 52 + 1024
    decoder, stand_in = gpu_decoder(scratch_bytes=bytes_of_three * 3)
    for _ in range(2):
        out = pixels_for(20)
        assert decoder.decode(photos.files, out) == []
        assert_decoded(photos, out, ("full",), SIZE)
    assert sum(stand_in.batches) == 40
    assert max(stand_in.batches) <= 4
    assert len(stand_in.batches) > 2 * 3


def test_the_columns_of_narrow_photos_split_a_batch_too() -> None:
    """Photos narrower than the result have more bytes of columns than of pixels."""
    photos = Photos([jpeg(400, 16) for _ in range(6)])
    decoder, stand_in = gpu_decoder(scratch_bytes=3 * (4 * 400 * 144 + 1000))
    out = pixels_for(6)
    assert decoder.decode(photos.files, out) == []
    assert_decoded(photos, out, ("full",), SIZE)
    assert stand_in.batches == [2, 2, 2]


def test_what_the_gpu_cannot_hold_or_resize_is_refused() -> None:
    photos = Photos([jpeg(64, 64), jpeg(640, 640), jpeg(64, 64), jpeg(16 * 33, 16)])
    decoder, _ = gpu_decoder(scratch_bytes=3 * 640 * 640 * 3)
    out = pixels_for(4)
    assert sorted(decoder.decode(photos.files, out)) == [1, 3]
    assert (out[[1, 3]] == 7).all()
    assert torch.equal(out[2], preprocess(photos.data[2], SIZE))


@pytest.mark.parametrize("bad", [0, 17, 63])
@pytest.mark.parametrize("kind", ["garbage", "truncated"])
def test_one_bad_file_sends_few_others_to_the_cpu(bad: int, kind: str) -> None:
    files = [jpeg(32 + n, 40) for n in range(64)]
    files[bad] = b"garbage" if kind == "garbage" else files[bad][: len(files[bad]) // 2]
    photos = Photos(files)
    decoder, stand_in = gpu_decoder()
    out = pixels_for(64)
    refused = decoder.decode(photos.files, out)
    assert bad in refused
    assert len(refused) == 8
    assert (out[refused] == 7).all()
    for place in sorted({*range(64)} - {*refused}):
        assert torch.equal(out[place], preprocess(files[place], SIZE))
    assert sum(stand_in.batches) <= 3 * 64
    assert len(stand_in.batches) == 7


def test_bad_files_alone_are_refused_each() -> None:
    photos = Photos([b"garbage"] * 20)
    decoder, _ = gpu_decoder()
    out = pixels_for(20)
    assert sorted(decoder.decode(photos.files, out)) == list(range(20))
    assert (out == 7).all()


def test_other_pixels_than_the_encoders_input_are_an_error() -> None:
    photos = Photos([jpeg(64, 64)])
    decoder, stand_in = gpu_decoder()
    right = pixels_for(2)
    for wrong in (right.contiguous(), right.float(), right[:, 0], pixels_for(2, ("full", "flip"))):
        with pytest.raises(ValueError, match="channels last"):
            decoder.decode(photos.files, wrong)
    for place in (-1, 2):
        with pytest.raises(IndexError, match=f"place {place} of 2"):
            decoder.decode([photos.files[0]._replace(place=place)], right)
    assert stand_in.batches == []
    assert (right == 7).all()


def test_sample_photos_have_the_pixels_of_preprocess(sample_data: object) -> None:
    folder = sample_data / "coco" / "val2017"  # type: ignore[operator]
    photos = Photos([path.read_bytes() for path in sorted(folder.iterdir())[:24]])
    decoder = GpuDecoder(
        CPU, 224, ("full",), batch_decoder=StandInDecoder(), kernels=resize_kernels()
    )
    out = pixels_for(24, size=224)
    assert decoder.decode(photos.files, out) == []
    assert_decoded(photos, out, ("full",), 224)


def every_kind() -> list[bytes]:
    """JPEGs whose pixels the hardware has to give: all kinds that `gpu_size` lets through."""
    exif = Image.Exif()
    exif[0x0112] = 1
    files = [
        jpeg(height, width, quality=quality)
        for height, width in [(16, 16), (17, 31), (64, 48), (333, 500), (480, 640), (640, 427)]
        for quality in (30, 75, 95, 100)
    ]
    files += [
        jpeg(123, 321, restart_marker_blocks=5),
        jpeg(124, 322, restart_marker_rows=1),
        jpeg(125, 323, optimize=True),
        jpeg(126, 324, exif=exif.tobytes()),
        jpeg(127, 325, icc_profile=bytes(70_000)),
        jpeg(128, 326, comment=b"a comment"),
    ]
    for height, width in [(16, 17), (99, 101), (480, 640)]:
        file = io.BytesIO()
        Image.open(io.BytesIO(jpeg(height, width))).convert("L").save(file, "JPEG")
        files.append(file.getvalue())
    assert all(gpu_size(read_header(data)) for data in files)
    return files


@pytest.fixture
def device() -> torch.device:
    """A GPU with the hardware, and nvJPEG."""
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        decoder = GpuDecoder(device, SIZE, ("full",))
        photos = Photos([jpeg(64, 64)])
        decoder.decode(photos.files, pixels_for(1).to(device))
        decoder.close()
    except NvjpegError as error:
        pytest.skip(str(error))
    return device


@contextmanager
def busy(device: torch.device) -> Iterator[None]:
    """Meanwhile another stream keeps all of the GPU busy."""
    stop = threading.Event()

    def work() -> None:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            matrix = torch.randn(4096, 4096, device=device, dtype=torch.float16)
            while not stop.is_set():
                for _ in range(10):
                    torch.mm(matrix, matrix)
                stream.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("views", "size"), [(("full",), 224), (VIEWS, 96), (("full", "flip", "center"), 33)]
)
def test_the_hardware_gives_the_pixels_of_preprocess(
    views: tuple[str, ...], size: int, device: torch.device
) -> None:
    """In batches of all sizes and orders, more than the ring has buffers."""
    photos = Photos(every_kind())
    count = len(photos.files)
    expected = torch.stack([preprocess(data, size, views) for data in photos.data])
    decoder = GpuDecoder(device, size, views, scratch_bytes=3 * (2 << 20))
    random = np.random.default_rng(0)
    with busy(device):
        for _ in range(20):
            order = random.permutation(count)[: random.integers(1, count + 1)].tolist()
            out = pixels_for(count, views, size).to(device)
            assert out.stride(2) == 1
            torch.cuda.current_stream(device).synchronize()
            assert decoder.decode([photos.files[n] for n in order], out) == []
            assert decoder.stream is not None
            decoder.stream.synchronize()
            apart = (out.cpu() != expected).flatten(1).any(1)
            assert not apart[order].any(), apart.nonzero().flatten().tolist()
    decoder.close()


@pytest.mark.gpu
def test_the_hardware_refuses_what_the_stand_in_refuses(device: torch.device) -> None:
    bad = {
        3: b"garbage" * 100,
        20: jpeg(64, 64, progressive=True),
    }
    files = [bad.get(n, jpeg(100 + n, 150)) for n in range(64)]
    photos = Photos(files)
    decoder = GpuDecoder(device, SIZE, ("full",))
    for _ in range(3):
        out = pixels_for(64).to(device)
        torch.cuda.current_stream(device).synchronize()
        refused = decoder.decode(photos.files, out)
        assert decoder.stream is not None
        decoder.stream.synchronize()
        assert {*bad} <= {*refused}
        assert len(refused) <= 24
        for place in sorted({*range(64)} - {*refused}):
            assert torch.equal(out[place].cpu(), preprocess(files[place], SIZE))
    decoder.close()
