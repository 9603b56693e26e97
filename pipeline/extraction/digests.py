"""Looking at many photo files, by threads: which are still those that a cache was made from.

A photo is recognized by the digest of its bytes, whatever its name, size or date. Reading and
digesting takes about a hundredth of the time of encoding.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cache.record import Strings
from cache.store import DONE, FeatureCache
from pipeline.photos.decoding import ImageError
from pipeline.photos.drive.shortages import check_shortage
from pipeline.photos.drive.silence import STALL_S, Silence, StalledError
from pipeline.photos.photo_file import file_digest, read_file
from pipeline.photos.sources.places import Place, shown
from pipeline.photos.sources.reading import changed_ns
from pipeline.photos.sources.source import Source

_SAMPLE_PHOTOS = 64  # of a cache that is continued; of fewer photos, all
_LATER_PHOTOS = 1000  # of those that a date says were written later
_TICK_S = 1.0
_REQUESTS = 16  # at once, of a store
_KEPT = "what is done is kept, run the same command again to continue"

_Seen = TypeVar("_Seen")


def look_at(
    source: Source,
    paths: Strings,
    rows: NDArray[np.int64],
    threads: int,
    look: Callable[[Place], _Seen],
) -> Iterator[tuple[int, _Seen]]:
    """(row, what `look` returns for its photo) for each row, in any order.

    paths: the names of all photos of `source`. Raises StalledError if no photo comes for `STALL_S`
    seconds, and what `look` raises.
    """
    tasks: queue.SimpleQueue[int] = queue.SimpleQueue()
    for row in rows.tolist():
        tasks.put(row)
    finished: queue.SimpleQueue[tuple[int, _Seen] | BaseException] = queue.SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            try:
                row = tasks.get_nowait()
            except queue.Empty:
                return
            try:
                finished.put((row, look(source.place(paths[row]))))
            except BaseException as error:  # not the photo's fault: the caller raises it
                finished.put(error)
                return

    if source.remote:  # where threads wait for answers, and not for a processor
        threads = max(threads, _REQUESTS)
    # Daemons, because a thread that hangs in a dead network drive must not keep the process alive.
    for number in range(min(threads, len(rows))):
        threading.Thread(target=work, name=f"digests-{number}", daemon=True).start()
    try:
        for _ in range(len(rows)):
            result = _next_of(finished, source.label)
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stopped.set()


def _next_of(
    finished: queue.SimpleQueue[tuple[int, _Seen] | BaseException], label: str
) -> tuple[int, _Seen] | BaseException:
    silence = Silence(STALL_S)
    while True:
        with contextlib.suppress(queue.Empty):
            return finished.get(timeout=_TICK_S)
        if silence.is_stall(0):
            raise StalledError(
                f"{label}: nothing came from the disk for {silence.seconds:.0f} s; {_KEPT}"
            )


def digest_or_none(place: Place) -> NDArray[np.uint8] | None:
    """The (16,) uint8 digest of a photo; None if it cannot be read.

    Raises ShortageError if the machine, and not the file, is the reason: too many open files, no
    memory, an error of the disk; and SourceError if what the photo lies in cannot be read.
    """
    try:
        return file_digest(read_file(place))
    except (OSError, MemoryError) as error:
        check_shortage(shown(place), error)
        return None
    except ImageError:
        return None


def other_photos(cache: FeatureCache, source: Source, threads: int) -> str | None:
    """Which photos have other bytes than when the cache was made, as one line; None if none.

    Looks at a random sample of the finished rows, and at those photos that were written after the
    cache, by the dates of their files; stores are not asked for dates. A date can be wrong and a
    sample miss a photo; `--update` and `cap verify` read them all. Photos that are gone or cannot
    be read are not other photos. Call it before the cache is written to. Raises StalledError or
    SourceError.
    """
    done = cache.rows_with(DONE)
    if not len(done):
        return None
    chance = np.random.default_rng(0)
    written_ns = os.stat(cache.path).st_mtime_ns
    later = [
        row
        for row, date_ns in look_at(source, cache.paths, done, threads, changed_ns)
        if date_ns > written_ns
    ]
    rows = np.union1d(
        chance.permutation(done)[:_SAMPLE_PHOTOS],
        chance.permutation(np.array(sorted(later), np.int64))[:_LATER_PHOTOS],
    )
    other = sorted(
        row
        for row, digest in look_at(source, cache.paths, rows, threads, digest_or_none)
        if digest is not None and not np.array_equal(digest, cache.digests[row])
    )
    if not other:
        return None
    first = shown(source.place(cache.paths[other[0]]))
    return (
        f"{cache.path}: {len(other):,} of {len(rows):,} photos looked at have other bytes than "
        f"those it was made from (first: {first}); --update encodes such photos again and keeps "
        "the others; or use another --out"
    )
