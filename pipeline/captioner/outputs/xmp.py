"""XMP files beside photos, as photo managers read them: the caption as `dc:description`."""

from __future__ import annotations

import re
from xml.sax.saxutils import escape, quoteattr, unescape

from pipeline.captions.mark import MARK

_TEXT = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    xmlns:cap="urn:x-cap:captions"
    cap:{name}={mark}>
   <dc:description>
    <rdf:Alt>
     <rdf:li xml:lang="x-default">{caption}</rdf:li>
    </rdf:Alt>
   </dc:description>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""
# What no XML document may hold, not even escaped.
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MARK = re.compile(f'cap:{MARK}=("[^"]*"|' + r"'[^']*')>")
_CAPTION = re.compile(r'<rdf:li xml:lang="x-default">([^<]*)</rdf:li>')
_QUOTES = {"&quot;": '"'}


class Xmp:
    """The best caption as the description in the default language.

    A file that another program wrote or changed is never replaced: it may hold ratings, tags and
    edits.
    """

    suffix = ".xmp"
    replaces_foreign = False

    def text(self, captions: list[str], mark: str) -> str:
        best = " ".join(_NO_XML.sub("\ufffd", captions[0]).split()) if captions else ""
        mark = _NO_XML.sub("\ufffd", mark)
        return _TEXT.format(name=MARK, mark=quoteattr(mark), caption=escape(best))

    def mark_in(self, text: str) -> str | None:
        mark, caption = _MARK.search(text), _CAPTION.search(text)
        if mark is None or caption is None:
            return None
        found = unescape(mark[1][1:-1], _QUOTES)
        same = self.text([unescape(caption[1])], found) == text
        return found if same else None
