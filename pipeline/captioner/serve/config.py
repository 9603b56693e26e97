"""The settings of the server. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from cache.errors import CapError
from train.option import check_bounds, option


class ServeError(CapError):
    """Raised when the server cannot start. The message is one line."""


@dataclass(frozen=True)
class ServeConfig:
    """Where the server listens, and how much it takes on at once."""

    host: str = option("127.0.0.1", "Address to listen at; 0.0.0.0 lets other machines in.")
    port: int = option(8000, "Port to listen at; 0 for any free one.", min=0, max=65535)
    allow_host: tuple[str, ...] | None = option(
        None,
        "Name by which the server is reached besides localhost, as behind a proxy. May be given "
        "several times.",
        many=str,
    )
    max_bytes: int = option(20_000_000, "Largest file of a photo, in bytes.", min=1000)
    max_pixels: int = option(
        50_000_000, "Largest photo, in pixels; larger ones are not decoded.", min=1
    )
    batch: int = option(8, "Photos that are captioned at once, at most.", min=1, max=256)
    queue: int = option(
        64, "Photos that may be uploading or waiting; further ones are told to come later.", min=1
    )

    def __post_init__(self) -> None:
        """Raises SettingError."""
        check_bounds(self)


@dataclass(frozen=True)
class Limits:
    """What the settings leave open. Times in seconds."""

    connections: int = 256  # the longest idle ones make room for new ones
    header_s: float = 10.0  # from the connection to the end of a request's headers
    body_grace_s: float = 10.0  # a body may take this long, and
    body_bytes_per_s: int = 16_000  # beyond that has to come at this rate
    body_bytes: int = 256_000_000  # of all photos that are uploading or waiting to be decoded
    linger_s: float = 2.0  # how long the rest of a refused body is read, so that the answer arrives
    gather_s: float = 0.004  # a batch waits this long for photos that are being decoded
    stop_s: int = 8  # after SIGTERM, for what is in flight; Docker kills after ten
