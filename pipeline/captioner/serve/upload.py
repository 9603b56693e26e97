"""The photo in a request: read piece by piece into memory, within limits of bytes and time.

Nothing is written to the disk. The name of the file is passed on and used for nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.types import Receive

from pipeline.captioner.serve.config import Limits
from pipeline.captioner.serve.refusal import ClientLeft, Refusal

_FIELD = b"file"
_FORM_BYTES = 10_000  # what a form may have besides the photo
_MOST_PARTS = 16
_NAME_CHARACTERS = 255
_RAW = ("image/", "application/octet-stream")
_HOW = "send a form with the photo as `file` (curl -F file=@photo.jpg), or its bytes as image/*"


@dataclass(frozen=True)
class Upload:
    """The bytes of a photo, and what its client calls it: not to be trusted."""

    data: bytes
    name: str


class BodyBudget:
    """The memory for all bodies that are being read or wait to be decoded."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes, self.used_bytes = size_bytes, 0

    def take(self, count: int) -> None:
        """Raises Refusal if there is no room for so many bytes more."""
        if self.used_bytes + count > self.size_bytes:
            raise Refusal("busy", "too many photos are arriving at once; try again in a second")
        self.used_bytes += count

    def give_back(self, count: int) -> None:
        self.used_bytes -= count


class Body:
    """The body of one request. A context manager that gives back the memory it has counted."""

    def __init__(self, receive: Receive, budget: BodyBudget, limits: Limits) -> None:
        self._receive, self._budget, self._limits = receive, budget, limits
        self._begun = time.monotonic()
        self._held = 0  # bytes counted in the budget
        self._received = 0
        self.complete = False

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *error: object) -> None:
        self._budget.give_back(self._held)

    async def pieces(self, most: int) -> AsyncIterator[bytes]:
        """The bytes as they come. Raises Refusal (slow, too large, busy) or ClientLeft."""
        limits = self._limits
        while not self.complete:
            allowed_s = limits.body_grace_s + self._received / limits.body_bytes_per_s
            try:
                async with asyncio.timeout(max(0.0, self._begun + allowed_s - time.monotonic())):
                    message = await self._receive()
            except TimeoutError:
                raise Refusal(
                    "slow",
                    f"the photo came too slowly: {self._received:,} bytes in {allowed_s:.0f} s",
                ) from None
            if message["type"] == "http.disconnect":
                raise ClientLeft
            piece = message.get("body", b"")
            self.complete = not message.get("more_body", False)
            self._received += len(piece)
            if self._received > most:
                raise too_large(most)
            self._budget.take(len(piece))
            self._held += len(piece)
            yield piece


def too_large(most: int) -> Refusal:
    return Refusal("too_large", f"too large: a photo may have {most:,} bytes")


async def read_upload(body: Body, headers: Iterable[tuple[bytes, bytes]], max_bytes: int) -> Upload:
    """The photo of a request. headers: with names in lower case. Raises Refusal or ClientLeft."""
    by_name = dict(headers)
    content_type, options = parse_options_header(by_name.get(b"content-type"))
    kind = content_type.decode("latin-1")
    boundary = options.get(b"boundary")
    if kind != "multipart/form-data" and not kind.startswith(_RAW):
        raise Refusal("media_type", f"not a photo's content type; {_HOW}")
    in_form = kind == "multipart/form-data"
    if in_form and not boundary:
        raise Refusal("malformed", f"the form has no boundary; {_HOW}")
    most = max_bytes + _FORM_BYTES if in_form else max_bytes
    announced = by_name.get(b"content-length", b"")
    if announced.isdigit() and int(announced) > most:
        raise too_large(max_bytes)
    if not in_form:
        data = bytearray()
        async for piece in body.pieces(max_bytes):
            data += piece
        return Upload(bytes(data), "")
    form = _Form(boundary or b"", max_bytes)
    async for piece in body.pieces(most):
        form.write(piece)
    return form.upload()


class _Form:
    """A form that is read piece by piece, of which only the photo is kept."""

    def __init__(self, boundary: bytes, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._parts = 0
        self._header = (bytearray(), bytearray())  # name and value of the one that is being read
        self._disposition = b""
        self._of_photo = self._found = self._ended = False
        self._name = ""
        self._data = bytearray()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": lambda data, a, b: self._header[0].extend(data[a:b]),
                    "on_header_value": lambda data, a, b: self._header[1].extend(data[a:b]),
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_end": self._on_end,
                },
            )
        except MultipartParseError:
            raise Refusal("malformed", f"the form's boundary is no boundary; {_HOW}") from None

    def write(self, piece: bytes) -> None:
        """Raises Refusal."""
        try:
            self._parser.write(piece)
        except MultipartParseError:
            raise Refusal("malformed", f"the form cannot be read; {_HOW}") from None

    def upload(self) -> Upload:
        """Raises Refusal if the form is not complete or has no photo."""
        if not self._ended:
            raise Refusal("malformed", "the form has no end; a part of the photo may be missing")
        if not self._found:
            raise Refusal("malformed", f"the form has no photo; {_HOW}")
        return Upload(bytes(self._data), self._name)

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise Refusal("malformed", f"the form has more than {_MOST_PARTS} parts")
        self._disposition, self._of_photo = b"", False

    def _on_header_end(self) -> None:
        name, value = self._header
        if bytes(name).lower() == b"content-disposition":
            self._disposition = bytes(value)
        self._header = (bytearray(), bytearray())

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if options.get(b"name") != _FIELD:
            return
        if self._found:
            raise Refusal("malformed", "the form has several photos; send one a request")
        self._found = self._of_photo = True
        name = options.get(b"filename", b"").decode("utf-8", "replace")
        self._name = name[:_NAME_CHARACTERS]

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._of_photo:
            return
        if len(self._data) + end - start > self._max_bytes:
            raise too_large(self._max_bytes)
        self._data += data[start:end]

    def _on_end(self) -> None:
        self._ended = True
