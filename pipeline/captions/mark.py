"""The mark of captions that this program wrote, so that no model learns from its own output.

Whatever writes captions to a file puts the mark in: as the header of a column in a table, as a
field of a JSON record or file, as a line of a text file, or anywhere in an XMP packet. Readers
refuse what carries it.
"""

from __future__ import annotations

MARK = "written_by_cap"


def marked(text: str) -> bool:
    """Whether a header, a name of a field, a line or an XMP packet carries the mark."""
    return MARK in text
