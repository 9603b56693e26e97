"""Image ids: text in this program, but some are numbers in the captions file."""

from __future__ import annotations


class NumberId(str):
    """An id that is a number in the captions file, as COCO's are: 42, not "42".

    It is text like every other id. Only a file of predictions needs to know, because tools that
    compare it with the captions file do not take one for the other.
    """

    __slots__ = ()


def image_id_of(value: object) -> str:
    """The id that a captions file gives as this JSON value: a NumberId, or a plain string."""
    if isinstance(value, int) and not isinstance(value, bool):
        return NumberId(value)
    return str(value)
