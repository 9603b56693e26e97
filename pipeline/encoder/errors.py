"""What can be wrong with an encoder."""

from __future__ import annotations

from cache.errors import CapError


class EncoderError(CapError):
    """Raised when a backbone, its weights or its device cannot be used. The message is one line."""


class MissingPackageError(EncoderError):
    """Raised when a package of an optional extra is missing. The message is one line."""


class PrecisionError(EncoderError):
    """Raised when a backbone cannot be computed in a precision. The message is one line."""
