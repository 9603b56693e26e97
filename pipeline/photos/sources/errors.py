"""The error of sources of photos."""

from __future__ import annotations

from cache.errors import CapError

GO_ON = "what is done is kept, run the same command again to continue"


class SourceError(CapError):
    """Raised when photos cannot be had from where they lie, which is no fault of one photo.

    The message is one line.
    """
