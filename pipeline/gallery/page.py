"""The page of a gallery: one HTML file with its style, its script and its data.

What comes from files (captions, names of files, references) is in the page as JSON, which no
browser takes for markup, and `page.js` makes text of it. A Content-Security-Policy allows this
style, this script, pictures that lie beside the page or inside it, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TEMPLATE = Path(__file__).with_name("page.html")
# What could end the script element or be taken for a line's end in it, and halves of surrogate
# pairs, which stand for bytes of names that are not UTF-8.
_UNSAFE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


def page_of(data: Mapping[str, Any]) -> str:
    """The HTML of a gallery. data: as `page.js` reads it, with `title`, `facts`, `thumbnails` and
    `photos`.
    """
    style = _TEMPLATE.with_suffix(".css").read_text(encoding="utf-8")
    script = _TEMPLATE.with_suffix(".js").read_text(encoding="utf-8")
    parts = {
        "POLICY": "; ".join(
            (
                "default-src 'none'",
                "img-src 'self' data:",
                f"style-src {_source(style)}",
                f"script-src {_source(script)}",
                "base-uri 'none'",
                "form-action 'none'",
                "require-trusted-types-for 'script'",
            )
        ),
        "TITLE": html.escape(data["title"].encode("utf-8", "replace").decode("utf-8")),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": embedded_json(data),
    }
    template = _TEMPLATE.read_text(encoding="utf-8")
    # In one pass, so that a title or a caption cannot be taken for a place of the template.
    return re.sub("@([A-Z]+)@", lambda found: parts[found[1]], template)


def embedded_json(value: object) -> str:
    r"""JSON that may stand in a script element: `<` is `\u003c`."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _source(text: str) -> str:
    """What a policy calls an element with this text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
