"""What a cache records about itself: how its features were made, its photos and its captions."""

from __future__ import annotations

import hashlib
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cache.errors import CapError

_NEAR_BYTES = 1 << 16
_ITERATED = 1 << 14  # strings at a time, so that the rest stays packed

FIRST_TOKENIZER = "treebank"  # the only one of 0.1.0, whose caches do not name it


class CacheError(CapError):
    """Raised when a cache is missing, damaged, unfinished, in use, or not the one asked for.

    The message is one line.
    """


@dataclass(frozen=True)
class EncoderRecord:
    """The identity of the frozen network and its preprocessing. Equal records mean equal features.

    `weights` is the user's name for the weights: a torchvision name, a path, or `random`. Records
    are compared by `weights_sha256`, so a weights file that was moved is still the same encoder.
    """

    backbone: str
    weights: str
    weights_sha256: str
    feature_dim: int
    image_size: int  # pixels, both sides
    views: tuple[str, ...]
    preprocessing: str
    precision: str  # of the arithmetic, not of the storage: float32, bfloat16 or float16

    def difference(self, other: EncoderRecord) -> str | None:
        """The first field that differs, as `field mine, not theirs`; None if the two are equal."""
        if self.backbone != other.backbone:
            return f"backbone {self.backbone}, not {other.backbone}"
        if self.weights_sha256 != other.weights_sha256:
            if self.weights != other.weights:
                return f"weights {self.weights}, not {other.weights}"
            return f"weights {self.weights_sha256[:12]}…, not {other.weights_sha256[:12]}…"
        for field in ("feature_dim", "image_size", "views", "preprocessing", "precision"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                if field == "views":
                    mine, theirs = ",".join(mine), ",".join(theirs)
                return f"{field} {mine}, not {theirs}"
        return None


class Strings(Sequence[str]):
    """Immutable strings in two arrays, so that a million strings do not take a million objects.

    text: (K,) uint8, the UTF-8 bytes of all strings in turn. offsets: (N + 1,) int64, where each
    string begins in `text`, and where the last one ends.
    """

    def __init__(self, text: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.text = text
        self.offsets = offsets

    @classmethod
    def pack(cls, items: Iterable[str]) -> Strings:
        text, offsets = bytearray(), array("q", [0])
        for item in items:
            text += item.encode("utf-8", "surrogateescape")
            offsets.append(len(text))
        return cls(np.frombuffer(text, np.uint8), np.frombuffer(offsets, np.int64))  # no copies

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.raw(index).decode("utf-8", "surrogateescape")

    def raw(self, index: int) -> bytes:
        """The bytes of one string, from index 0 on."""
        return self.text[int(self.offsets[index]) : int(self.offsets[index + 1])].tobytes()

    def raws(self, index: NDArray[np.int64]) -> list[bytes]:
        """The bytes of these strings, from index 0 on. Faster than one by one if they are near."""
        if not len(index):
            return []
        starts, stops = self.offsets[index], self.offsets[index + 1]
        first, last = int(starts.min()), int(stops.max())
        if last - first > 4 * int((stops - starts).sum()) + _NEAR_BYTES:
            return [self.raw(each) for each in index.tolist()]
        data = self.text[first:last].tobytes()
        bounds = zip((starts - first).tolist(), (stops - first).tolist(), strict=True)
        return [data[start:stop] for start, stop in bounds]

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _ITERATED):
            bounds = self.offsets[first : first + _ITERATED + 1].tolist()
            data = self.text[bounds[0] : bounds[-1]].tobytes()
            for start, stop in pairwise(bound - bounds[0] for bound in bounds):
                yield data[start:stop].decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Strings):
            return NotImplemented
        return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.text, other.text)

    __hash__ = None  # type: ignore[assignment]

    def where(self, kept: NDArray[np.bool_]) -> Strings:
        """The strings for which `kept` (N,) is true, in the same order."""
        if kept.all():
            return self
        lengths = np.diff(self.offsets)
        return Strings(self.text[np.repeat(kept, lengths)], offsets_of(lengths[kept]))

    def part(self, start: int, stop: int) -> Strings:
        """The strings `start` to `stop` - 1, without copying their bytes."""
        offsets = self.offsets[start : stop + 1]
        return Strings(self.text[offsets[0] : offsets[-1]], offsets - offsets[0])

    def take(self, index: NDArray[np.int64]) -> Strings:
        """The strings of these numbers (K,), in this order."""
        starts, lengths = self.offsets[:-1][index], np.diff(self.offsets)[index]
        offsets = offsets_of(lengths)
        text = np.empty(offsets[-1], np.uint8)
        for first in range(0, len(index), _ITERATED):
            part = slice(first, first + _ITERATED)
            ends = np.cumsum(lengths[part])
            # For each byte its place in `self.text`.
            places = np.arange(ends[-1]) + np.repeat(
                starts[part] - ends + lengths[part], lengths[part]
            )
            text[offsets[first] : offsets[first] + ends[-1]] = self.text[places]
        return Strings(text, offsets)

    @classmethod
    def join(cls, parts: Sequence[Strings]) -> Strings:
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        return cls(np.concatenate([part.text for part in parts]), offsets_of(lengths))

    def update(self, digest: hashlib._Hash) -> None:
        digest.update(np.ascontiguousarray(self.offsets).data)
        digest.update(np.ascontiguousarray(self.text).data)


def offsets_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) lengths of consecutive parts → (N + 1,) offsets of their beginnings, and the end."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


@dataclass(frozen=True)
class CaptionTable:
    """The captions of N photos: M raw texts, and their tokens numbered by frequency.

    Word 0 of `words` is the most frequent token, with ties in alphabetical order. So a vocabulary
    of all the captions is a prefix of `words` for any minimum count.
    """

    texts: Strings  # M raw captions
    rows: NDArray[np.int32]  # (M,) the photo row of each caption, ascending
    tokens: NDArray[np.int32]  # (K,) indices into `words`, caption after caption
    token_offsets: NDArray[np.int64]  # (M + 1,)
    words: Strings  # W distinct tokens
    counts: NDArray[np.int64]  # (W,) how often each occurs, descending
    tokenizer: str = FIRST_TOKENIZER  # what split the texts, see `train.captions.script`

    def __len__(self) -> int:
        return len(self.rows)

    def by_row(self, row_count: int) -> list[list[str]]:
        """The raw captions of every photo row: a list of `row_count` lists."""
        grouped: list[list[str]] = [[] for _ in range(row_count)]
        for row, text in zip(self.rows.tolist(), self.texts, strict=True):
            grouped[row].append(text)
        return grouped

    def part(self, start: int, stop: int) -> CaptionTable:
        """The captions `start` to `stop` - 1, without copies of texts and tokens."""
        tokens = self.token_offsets[start : stop + 1]
        return replace(
            self,
            texts=self.texts.part(start, stop),
            rows=self.rows[start:stop],
            tokens=self.tokens[tokens[0] : tokens[-1]],
            token_offsets=tokens - tokens[0],
        )

    def of_photos(self, rows: NDArray[np.int64] | None) -> NDArray[np.bool_]:
        """(M,) whether a caption is of one of these photos; None: of any."""
        if rows is None:
            return np.ones(len(self), bool)
        wanted = np.zeros(max(self.rows.max(initial=-1), rows.max(initial=-1)) + 1, bool)
        wanted[rows] = True
        return wanted[self.rows]

    def other_tokenizer(self, other: CaptionTable) -> str | None:
        """`tokenizer mine, not theirs`; None if they are equal or one of the tables is empty."""
        if self.tokenizer == other.tokenizer or not len(self) or not len(other):
            return None
        return f"tokenizer {self.tokenizer}, not {other.tokenizer}"

    def sha256(self) -> str:
        digest = hashlib.sha256()
        self.texts.update(digest)
        self.words.update(digest)
        for numbers in (self.rows, self.tokens, self.token_offsets):
            digest.update(np.ascontiguousarray(numbers).data)
        return digest.hexdigest()


def no_captions() -> CaptionTable:
    return CaptionTable(
        texts=Strings.pack([]),
        rows=np.zeros(0, np.int32),
        tokens=np.zeros(0, np.int32),
        token_offsets=np.zeros(1, np.int64),
        words=Strings.pack([]),
        counts=np.zeros(0, np.int64),
    )


@dataclass(frozen=True)
class Shard:
    """Which part of a larger set of photos a cache holds: those from `first_row`, of `all_rows`."""

    number: int  # 1 … count
    count: int
    first_row: int
    all_rows: int
    all_photos_sha256: str  # of the whole set, as `photos_sha256`
    all_captions_sha256: str  # of the whole set, as `texts_sha256`

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@dataclass(frozen=True)
class Skeleton:
    """Everything in a cache that is known before the first photo is decoded.

    image_ids, paths: N each; a path is relative to the image folder. batch_rows: the encoder's
    batch size. Rows k · batch_rows to (k + 1) · batch_rows - 1 are always computed together, at the
    same places in the batch, so a resumed extraction computes exactly what an uninterrupted one
    does. numbered: (N,) whether an id was a number in the captions file; None if that is unknown.
    """

    image_ids: Strings
    paths: Strings
    captions: CaptionTable
    encoder: EncoderRecord
    batch_rows: int
    shard: Shard | None = None
    numbered: NDArray[np.bool_] | None = None

    def photos_sha256(self) -> str:
        return photos_sha256(self.image_ids, self.paths)


def texts_sha256(texts: Strings, rows: NDArray[np.int32]) -> str:
    """Identifies M raw captions, their order, and the photo row (M,) of each."""
    digest = hashlib.sha256()
    texts.update(digest)
    digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()


def photos_sha256(image_ids: Strings, paths: Strings) -> str:
    """Identifies the photos and their order."""
    digest = hashlib.sha256()
    image_ids.update(digest)
    paths.update(digest)
    return digest.hexdigest()


def made_by(attributes: Mapping[str, str | int]) -> tuple[EncoderRecord, int, Shard | None]:
    """(encoder, batch_rows, shard) from a cache's attributes. Raises KeyError or ValueError."""
    encoder = EncoderRecord(
        backbone=str(attributes["backbone"]),
        weights=str(attributes["weights"]),
        weights_sha256=str(attributes["weights_sha256"]),
        feature_dim=int(attributes["feature_dim"]),
        image_size=int(attributes["image_size"]),
        views=tuple(str(attributes["views"]).split(",")),
        preprocessing=str(attributes["preprocessing"]),
        precision=str(attributes["precision"]),
    )
    batch_rows = int(attributes["batch_rows"])
    if min(batch_rows, encoder.image_size, encoder.feature_dim) < 1:
        raise ValueError("sizes are positive")
    if "shard" not in attributes:
        return encoder, batch_rows, None
    number, count = map(int, str(attributes["shard"]).split("/"))
    shard = Shard(
        number=number,
        count=count,
        first_row=int(attributes["shard_first_row"]),
        all_rows=int(attributes["all_rows"]),
        all_photos_sha256=str(attributes["all_photos_sha256"]),
        all_captions_sha256=str(attributes["all_captions_sha256"]),
    )
    if not 1 <= number <= count or not 0 <= shard.first_row < shard.all_rows:
        raise ValueError("no such shard")
    return encoder, batch_rows, shard


def join_versions(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The library versions behind several parts of a cache, by name; where they differ, all.

    {"torch": "2.13"} and {"torch": "2.14"} → {"torch": "2.13, 2.14"}.
    """
    joined: dict[str, dict[str, None]] = {}
    for part in parts:
        for name, versions in part.items():
            joined.setdefault(name, {}).update(dict.fromkeys(versions.split(", ")))
    return {name: ", ".join(versions) for name, versions in joined.items()}


def pack_versions(versions: Mapping[str, str]) -> bytes:
    """One line of `later_versions`: the CRC-32 of a JSON object, and the object."""
    text = json.dumps(dict(versions), sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def unpack_versions(lines: bytes) -> tuple[list[dict[str, str]], int]:
    """(the content of all whole lines, the number of their bytes).

    A line that a power cut has torn is left out, and so is all that follows it.
    """
    found: list[dict[str, str]] = []
    length = 0
    while (stop := lines.find(b"\n", length)) >= 0:
        checksum, _, text = lines[length:stop].partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            break
        found.append({str(name): str(version) for name, version in json.loads(text).items()})
        length = stop + 1
    return found, length
