"""Captions inside photos, where photo managers write them: IPTC, XMP, EXIF, and texts of PNGs.

An XMP file beside a photo counts as if it were inside.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from pipeline.captions.formats.beside import left_out_notes
from pipeline.captions.mark import marked
from pipeline.captions.photo_index import PhotoIndex
from pipeline.captions.records import DatasetError, Reading, shortened

METADATA = "metadata"
_IPTC_CAPTION = (2, 120)
_EXIF_DESCRIPTION = 0x010E
_DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}description"
_LIST_ITEM = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"
_LARGEST_XMP_BYTES = 1 << 20
# What cameras and programs write for want of a caption.
_NO_CAPTION = re.compile(
    r"(olympus|minolta|konica|kodak|samsung|casio|pentax)?( konica minolta)?( digital)? cameras?"
    r"|sony dsc|exif_jpeg.*|<digimax.*|dcim\b.*|(img|dsc[nf]?|dji|mvimg|pxl)_?\d+.*|jpeg|hdr"
    r"|samsung camera pictures|untitled|default|screenshot|(created|processed|edited) with .*",
    re.IGNORECASE,
)
# A text of so many photos at least, and of this share of them, describes none of them.
_COMMON, _COMMON_SHARE = 3, 0.1


def read_metadata(photos: Iterable[str], index: PhotoIndex) -> Reading:
    """The captions inside photos, whose paths are below the folder of the index.

    Left out are texts that cameras write, the same text in many photos, and captions that this
    program wrote. Raises DatasetError if nothing is left.
    """
    reading = Reading(str(index.images), "captions inside the photos (IPTC, XMP, EXIF)")
    found: dict[str, list[str]] = {}
    without = written = 0
    for photo in photos:
        texts, is_written = _captions_inside(photo, index)
        if is_written:
            written += 1
        elif texts:
            found[photo] = texts
        else:
            without += 1
    first = Counter(text for texts in found.values() for text in set(texts))
    common = max(_COMMON, _COMMON_SHARE * len(found))
    useless = {text for text, count in first.items() if count >= common}
    for text in sorted(useless, key=lambda text: -first[text])[:3]:
        reading.notes.append(f"{first[text]:,} photos have the text {shortened(text)}, no caption")
    for photo, texts in found.items():
        captions = [text for text in texts if text not in useless]
        if captions:
            reading.rows += 1
            reading.add(photo, captions[:1])
        else:
            without += 1
    reading.notes += left_out_notes(without, "no caption inside them", written)
    if not reading.names:
        raise DatasetError(
            f"{index.images}: no captions inside the photos ({'; '.join(reading.notes)})"
        )
    return reading


def _captions_inside(photo: str, index: PhotoIndex) -> tuple[list[str], bool]:
    """(the captions of a photo, the surest first; whether this program wrote them)."""
    packets = [index.images / name for name in _packets_beside(photo, index)]
    iptc, exif, xmp = _read(index.images / photo)
    for packet in packets:
        try:
            with packet.open("rb") as file:
                xmp.append(file.read(_LARGEST_XMP_BYTES))
        except OSError:
            continue
    if any(marked(packet.decode("utf-8", "replace")) for packet in xmp):
        return [], True
    texts = [*iptc, *(text for packet in xmp for text in _descriptions(packet)), *exif]
    cleaned = (" ".join(text.replace("\0", " ").split()) for text in texts)
    return [text for text in cleaned if text and not _NO_CAPTION.fullmatch(text)], False


def _packets_beside(photo: str, index: PhotoIndex) -> Iterator[str]:
    stem = photo.rpartition(".")[0] or photo
    return (name for name in (f"{stem}.xmp", f"{photo}.xmp", f"{stem}.XMP") if name in index)


def _read(path: Path) -> tuple[list[str], list[str], list[bytes]]:
    """(IPTC captions, EXIF and PNG descriptions, XMP packets) of a photo, which is not decoded."""
    import warnings

    from PIL import Image, IptcImagePlugin

    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # of damaged metadata
            iptc: Any = (IptcImagePlugin.getiptcinfo(image) or {}).get(_IPTC_CAPTION, [])
            exif = [image.getexif().get(_EXIF_DESCRIPTION), image.info.get("Description")]
            xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    except Exception:  # whatever a damaged photo makes of Pillow; decoding will say what is wrong
        return [], [], []
    iptc = iptc if isinstance(iptc, list) else [iptc]
    packet = xmp.encode() if isinstance(xmp, str) else bytes(xmp)
    return (
        [text for each in iptc if (text := _decoded(each))],
        [text for each in exif if (text := _decoded(each))],
        [packet] if packet and len(packet) <= _LARGEST_XMP_BYTES else [],
    )


def _decoded(value: object) -> str:
    """Text of metadata: UTF-8, or else what Western programs wrote before it."""
    if isinstance(value, str):  # Pillow decodes EXIF as ISO-8859-1
        try:
            return value.encode("latin-1").decode("utf-8")
        except (UnicodeEncodeError, UnicodeDecodeError):
            return value
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("cp1252", "replace")
    return ""


def _descriptions(packet: bytes) -> list[str]:
    """The descriptions of an XMP packet, in its order of languages."""
    from defusedxml.common import DefusedXmlException
    from defusedxml.ElementTree import fromstring

    try:
        root: Element = fromstring(packet.strip(b"\0 \n"))
    except (ParseError, DefusedXmlException, ValueError):
        return []
    texts = []
    for element in root.iter(_DUBLIN_CORE):
        items = [item.text or "" for item in element.iter(_LIST_ITEM)]
        texts += items or [element.text or ""]
    for element in root.iter():  # written as an attribute by some programs
        if _DUBLIN_CORE in element.attrib:
            texts.append(element.attrib[_DUBLIN_CORE])
    return texts
