"""Loading photos ahead of the encoder: readers read, digest, decode and resize batch after batch.

A few batch-sized buffers circulate between the readers and the encoder. For a GPU they are pinned,
so that copies to it overlap with its work. Where a GPU decodes JPEGs, most photos are left as their
files' bytes (`LoadedBatch.files`), and readers decode the others.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cache.store import DIGEST_BYTES
from pipeline.photos.drive.silence import GLANCE_S, STALL_S, Silence, StalledError
from pipeline.photos.drive.witnesses import Witnesses
from pipeline.photos.preprocessing import BILINEAR
from pipeline.photos.readers.processes import ProcessReaders
from pipeline.photos.readers.task import Buffer, FileInMemory, Loaded, Readers, Task, Wanted
from pipeline.photos.readers.threads import ThreadReaders
from pipeline.photos.sources.places import Place, address_of, shown

# How many photos a reader takes at once: few enough to keep all readers busy to the end, enough to
# make handing them over cheap.
_TASK_PHOTOS = 4
_FILE_TASK_PHOTOS = 16
_BATCHES_AHEAD = 3
_FILE_BATCHES_AHEAD = 4

# The share of the photos that readers decode although a GPU could: it rises while loaded batches
# wait for the GPU, and falls while the GPU waits for batches.
_MOST_SHARE, _SHARE_UP, _SHARE_DOWN = 0.5, 0.02, 0.04
_WAITING = 3  # batches


class BatchRequest(NamedTuple):
    """A batch to load: the row of its first place, and the rows whose photos are wanted."""

    first: int
    rows: Sequence[int]  # at least `first`, ascending


@dataclass
class LoadedBatch:
    """The photos of rows `first` … `first + len(pixels) - 1`. Rows not requested are black.

    pixels: (R, V, 3, S, S) uint8, channels last in memory, valid until `PhotoLoader.release`.
    digests: (R, 16) uint8, of the files in each place, zeros without one. errors: of the requested
    rows that cannot be read or decoded. decoded: the requested rows that have pixels. files: of
    those that a GPU can decode, valid as long as the pixels; most of them have no pixels yet, and
    what is in their places is undefined.
    """

    first: int
    pixels: Tensor
    digests: NDArray[np.uint8]
    errors: dict[int, str] = field(default_factory=dict)
    decoded: set[int] = field(default_factory=set)
    files: dict[int, FileInMemory] = field(default_factory=dict)
    buffer: Buffer | None = None


class PhotoLoader:
    """Iterates over loaded batches in order. A context manager: leaving it stops the readers.

    path_of: where the photo of a row lies. batch_rows: the places of every batch, however few rows
    are requested. processes: whether the readers are processes, and not threads. files: whether
    JPEGs that a GPU can decode are left to it; this needs processes. both: of how many batches,
    from the first on, such JPEGs are decoded as well. filter: see `preprocess`.

    Iteration raises StalledError if no photo arrives for `stall_s` seconds, whose message ends with
    `advice`; VanishedError if the drive seems to be gone; SourceError if what photos lie in cannot
    be read; ShortageError; and ReaderError. An error with one photo is in the `reads` of its batch.
    """

    def __init__(
        self,
        batches: Sequence[BatchRequest],
        path_of: Callable[[int], Place],
        *,
        batch_rows: int,
        image_size: int,
        views: tuple[str, ...],
        readers: int,
        processes: bool = False,
        files: bool = False,
        both: int = 0,
        pin_memory: bool = False,
        filter: str = BILINEAR,
        stall_s: float = STALL_S,
        advice: str = "what is done is kept, run the same command again to continue",
    ) -> None:
        self.notices: list[str] = []  # messages for the user; whoever shows them clears the list
        self._batches = batches
        self._path_of = path_of
        self._stall_s, self._advice = stall_s, advice
        self._files, self._both = files, both
        self._share, self._share_due = 0.0, 0.0
        count = min(readers, sum(len(batch.rows) for batch in batches))
        self._readers: Readers
        if processes:
            self._readers = ProcessReaders(
                count,
                batch_rows=batch_rows,
                image_size=image_size,
                views=views,
                pin_memory=pin_memory,
                files=files,
                filter=filter,
            )
        else:
            self._readers = ThreadReaders(
                count,
                batch_rows=batch_rows,
                image_size=image_size,
                views=views,
                pin_memory=pin_memory,
                filter=filter,
            )
        self._free: deque[Buffer] = deque()
        self._finished = threading.Condition()
        self._ahead: deque[_Loading] = deque()
        self._looked = False  # for witnesses
        self._left = False  # the context
        witnesses = Witnesses([batch.rows for batch in batches], path_of)
        # Rows whose photos are missing, until it is clear that the drive is not. None is
        # the end.
        self._missing: queue.SimpleQueue[tuple[_Loading, int] | None] = queue.SimpleQueue()
        # A daemon, because a drive may hang.
        self._inquirer = threading.Thread(
            target=self._inquire, args=(witnesses,), name="witnesses", daemon=True
        )

    def __enter__(self) -> Self:
        self._inquirer.start()
        self._readers.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._missing.put(None)
        with self._finished:
            self._left = True
            self._finished.notify_all()
        self._readers.close()

    def __iter__(self) -> Iterator[LoadedBatch]:
        submitted = map(self._submit, range(len(self._batches)))  # each is submitted when taken
        ahead = _FILE_BATCHES_AHEAD if self._files else _BATCHES_AHEAD
        self._ahead.extend(islice(submitted, ahead))
        while self._ahead:
            loading = self._ahead.popleft()
            self._wait(loading)
            self._adjust_share()
            self._ahead.extend(islice(submitted, 1))
            yield loading.batch

    def release(self, batch: LoadedBatch) -> None:
        """Return a batch's buffer for reuse. No device may still be reading it."""
        assert batch.buffer is not None
        self._free.append(batch.buffer)

    def decode(self, batch: LoadedBatch, rows: Sequence[int]) -> None:
        """Let readers decode photos of a batch that a GPU has refused, and wait for them.

        Their errors, and the rows that are decoded, are then as if no GPU had been asked. Raises as
        iteration does.
        """
        assert batch.buffer is not None
        for row in rows:
            del batch.files[row]
        loading = _Loading(batch, set(rows))
        self._hand_over(loading, [self._wanted(batch.first, row, True, False) for row in rows])
        self._wait(loading)

    def leave_no_files(self) -> None:
        """From now on readers decode every photo of the batches that are not asked for yet."""
        self._files = False

    def _submit(self, number: int) -> _Loading:
        first, rows = self._batches[number]
        buffer = self._free.popleft() if self._free else self._readers.new_buffer()
        digests = np.zeros((len(buffer.pixels), DIGEST_BYTES), np.uint8)
        loading = _Loading(LoadedBatch(first, buffer.pixels, digests, buffer=buffer), set(rows))
        for place in set(range(len(buffer.pixels))) - {row - first for row in rows}:
            buffer.pixels[place] = 0
        both = self._files and number < self._both
        wanted = []
        for row in rows:
            pixels = not self._files or self._is_due()
            wanted.append(self._wanted(first, row, pixels or both, both or not pixels))
        self._hand_over(loading, wanted)
        return loading

    def _wanted(self, first: int, row: int, pixels: bool, file: bool) -> Wanted:
        return Wanted(row, row - first, self._path_of(row), pixels, file)

    def _hand_over(self, loading: _Loading, wanted: list[Wanted]) -> None:
        assert loading.batch.buffer is not None
        photos = _FILE_TASK_PHOTOS if self._files else _TASK_PHOTOS
        for start in range(0, len(wanted), photos):
            part = wanted[start : start + photos]
            self._readers.submit(
                Task(
                    loading.batch.buffer,
                    part,
                    partial(self._take, loading, part),
                )
            )

    def _is_due(self) -> bool:
        """Whether readers decode the next photo although a GPU could."""
        self._share_due += self._share
        if self._share_due < 1:
            return False
        self._share_due -= 1
        return True

    def _adjust_share(self) -> None:
        if not self._files:
            return
        waiting = 1  # the one that is being taken
        for loading in self._ahead:
            if loading.left:
                break
            waiting += 1
        if waiting >= _WAITING:
            self._share = min(_MOST_SHARE, self._share + _SHARE_UP)
        elif waiting == 1:
            self._share = max(0.0, self._share - _SHARE_DOWN)

    def _wait(self, loading: _Loading) -> None:
        silence = Silence(self._stall_s)
        with self._finished:
            # No batch before the witnesses are known: its user might take the drive away.
            while (loading.left or not self._looked) and loading.failure is None:
                if self._left:
                    raise RuntimeError("the loader is closed")
                self._finished.wait(GLANCE_S)
                if silence.is_stall(self._readers.photos_heard()):
                    place = self._path_of(min(loading.left, default=loading.batch.first))
                    whence = "disk" if address_of(place) is None else "network"
                    raise StalledError(
                        f"{shown(place)}: nothing came from the {whence} for "
                        f"{silence.seconds:.0f} s; {self._advice}"
                    )
        if loading.failure is not None:
            raise loading.failure

    def _take(
        self, loading: _Loading, wanted: Sequence[Wanted], loaded: Loaded | BaseException
    ) -> None:
        """What a reader has loaded, or why it could not."""
        if isinstance(loaded, BaseException):
            self._fail(loading, loaded)
            return
        batch = loading.batch
        digests = np.frombuffer(loaded.digests, np.uint8).reshape(-1, DIGEST_BYTES)
        batch.digests[[photo.place for photo in wanted[: len(digests)]]] = digests
        batch.errors.update(loaded.errors)
        batch.decoded.update(loaded.decoded)
        batch.files.update(loaded.files)
        for row in loaded.missing:
            self._missing.put((loading, row))
        self._finish(loading, {photo.row for photo in wanted}.difference(loaded.missing))

    def _finish(self, loading: _Loading, rows: Collection[int]) -> None:
        with self._finished:
            loading.left.difference_update(rows)
            if not loading.left:
                self._finished.notify_all()

    def _fail(self, loading: _Loading, error: BaseException) -> None:
        with self._finished:
            loading.failure = error
            self._finished.notify_all()

    def _inquire(self, witnesses: Witnesses) -> None:
        """See whether photos are missing because the drive is gone."""
        witnesses.look()
        with self._finished:
            self._looked = True
            self._finished.notify_all()
        while (item := self._missing.get()) is not None:
            loading, row = item
            try:
                witnesses.check(row)
            except BaseException as error:  # the caller raises it
                self._fail(loading, error)
            else:
                self._finish(loading, [row])


@dataclass
class _Loading:
    """A batch that readers are working on."""

    batch: LoadedBatch
    left: set[int]  # rows not finished
    failure: BaseException | None = None
