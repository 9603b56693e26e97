"""What is wrong with a file of the tutorial."""

from __future__ import annotations

from cache.errors import CapError


class ClassicError(CapError):
    """Raised for a file that is not one of the tutorial's, or does not belong to the others.

    The message is one line that begins with the file.
    """
