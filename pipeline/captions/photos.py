"""Photos with their captions, packed: a million of them do not take ten million objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import eq
from typing import overload

import numpy as np
from numpy.typing import NDArray

from cache.record import Strings, offsets_of
from pipeline.captions.image_ids import NumberId
from pipeline.captions.records import Photo


@dataclass(frozen=True, eq=False)
class Photos(Sequence[Photo]):
    """N photos and their M captions.

    image_ids, paths: N each. numbered: (N,) whether an id is a number in the captions file. texts:
    M captions, photo after photo. first: (N + 1,) int64, where each photo's captions begin in
    `texts`, and where the last one's end.
    """

    image_ids: Strings
    paths: Strings
    numbered: NDArray[np.bool_]
    texts: Strings
    first: NDArray[np.int64]

    @classmethod
    def pack(cls, photos: Iterable[Photo]) -> Photos:
        """Raises UnicodeEncodeError for half of a character in a caption or a name."""
        listed = list(photos)
        return cls(
            Strings.pack(photo.image_id for photo in listed),
            Strings.pack(photo.path for photo in listed),
            np.array([isinstance(photo.image_id, NumberId) for photo in listed], bool),
            Strings.pack(text for photo in listed for text in photo.captions),
            offsets_of(np.array([len(photo.captions) for photo in listed], np.int64)),
        )

    @property
    def caption_rows(self) -> NDArray[np.int32]:
        """(M,) the photo of each caption."""
        return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.first))

    def __len__(self) -> int:
        return len(self.paths)

    def __eq__(self, other: object) -> bool:
        """Whether these are the photos of another sequence, with the same captions."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    @overload
    def __getitem__(self, index: int) -> Photo: ...

    @overload
    def __getitem__(self, index: slice) -> Photos: ...

    def __getitem__(self, index: int | slice) -> Photo | Photos:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self.take(np.arange(start, stop, step))
            stop = max(start, stop)
            first = self.first[start : stop + 1]
            return Photos(
                self.image_ids.part(start, stop),
                self.paths.part(start, stop),
                self.numbered[start:stop],
                self.texts.part(int(first[0]), int(first[-1])),
                first - first[0],
            )
        image_id, path = self.image_ids[index], self.paths[index]
        index %= len(self)
        texts = self.texts[int(self.first[index]) : int(self.first[index + 1])]
        return Photo(NumberId(image_id) if self.numbered[index] else image_id, path, tuple(texts))

    def __iter__(self) -> Iterator[Photo]:
        texts = iter(self.texts)
        counts = np.diff(self.first)
        for image_id, path, numbered, count in zip(
            self.image_ids, self.paths, self.numbered, counts, strict=True
        ):
            captions = tuple(next(texts) for _ in range(count))
            yield Photo(NumberId(image_id) if numbered else image_id, path, captions)

    def take(self, rows: NDArray[np.int64]) -> Photos:
        """The photos of these rows (K,), in this order."""
        if len(rows) == len(self) and (rows[:-1] < rows[1:]).all():
            return self
        counts = np.diff(self.first)[rows]
        first = offsets_of(counts)
        # Each caption's place in its photo, and from where that counts.
        captions = np.arange(first[-1]) + np.repeat(self.first[:-1][rows] - first[:-1], counts)
        return Photos(
            self.image_ids.take(rows),
            self.paths.take(rows),
            self.numbered[rows],
            self.texts.take(captions),
            first,
        )
