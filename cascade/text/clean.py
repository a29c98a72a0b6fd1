"""Caption cleaning as DeepFloyd IF fed its T5 (deepfloyd_if/modules/t5.py): the same rules in the same
order, run twice, on the standard library alone. A network trained on cleaned captions expects them so.

The original calls BeautifulSoup to strip markup and ftfy to mend text. Here a parser of the standard
library strips markup, and of ftfy's work the parts that change what T5 reads are kept: entities,
ligatures and full-width forms, curly quotes, control characters, NFC. Mojibake is left as it is.
"""

from __future__ import annotations

import html
import re
import unicodedata
from html.parser import HTMLParser
from urllib.parse import unquote_plus

_TLDS = "com|co|ru|net|org|edu|gov|it"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_BAD_PUNCTUATION = r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+"


def _url(scheme: str) -> str:
    # a lookahead keeps mail addresses; "www:" is the original's spelling
    return rf"\b((?:{scheme}:(?:\/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:{_TLDS})[\w/-]*\b\/?(?!@)))"


_BEFORE_MENDING = [
    (r"@[\w\d]+\b", ""),  # @nickname
    ("[\u31c0-\u31ef]+", ""),  # CJK strokes
    ("[\u31f0-\u31ff]+", ""),  # katakana phonetic extensions
    ("[\u3200-\u32ff]+", ""),  # enclosed CJK letters and months
    ("[\u3300-\u33ff]+", ""),  # CJK compatibility
    ("[\u3400-\u4dbf]+", ""),  # CJK extension A
    ("[\u4dc0-\u4dff]+", ""),  # hexagrams
    ("[\u4e00-\u9fff]+", ""),  # CJK unified ideographs
    (rf"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),  # article numbers
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILES})", ""),  # file names
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (_BAD_PUNCTUATION, " "),
    (r"\s+\.\s+", " "),
]
_AFTER_MENDING = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes, with a Latin or a Cyrillic x
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
]
_BEFORE = [(re.compile(pattern), new) for pattern, new in _BEFORE_MENDING]
_AFTER = [(re.compile(pattern), new) for pattern, new in _AFTER_MENDING]
_URLS = [re.compile(_url("https?")), re.compile(_url("www"))]
# Latin ligatures, and half- and full-width forms
_FORMS = re.compile("[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06\u3000\uff01-\uffee]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff\ufff9-\ufffb]")


def clean_caption(caption: str) -> str:
    """The cleaned caption: lower case, without markup, addresses, file names, codes and shop phrases."""
    return _clean_once(_clean_once(caption))


def _clean_once(caption: str) -> str:
    caption = unquote_plus(caption).strip().lower()
    caption = caption.replace("<person>", "person")
    for pattern in _URLS:
        caption = pattern.sub("", caption)
    caption = _without_markup(caption)
    for pattern, new in _BEFORE:
        caption = pattern.sub(new, caption)
    if len(re.findall(r"[-_]", caption)) > 3:  # this-is-my-cute-cat
        caption = re.sub(r"[-_]", " ", caption)
    caption = html.unescape(html.unescape(_mend(caption)))
    for pattern, new in _AFTER:
        caption = pattern.sub(new, caption)
    return caption.strip()


def _mend(text: str) -> str:
    """What ftfy.fix_text does to text that was decoded well."""
    text = html.unescape(text) if "<" not in text else text
    text = _CONTROL.sub("", text).replace("\r\n", "\n").replace("\r", "\n")
    text = _FORMS.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = re.sub("[\u02bc\u2018-\u201b]", "'", re.sub("[\u201c-\u201f]", '"', text))
    return unicodedata.normalize("NFC", text)


class _Text(HTMLParser):
    """The text between the tags; scripts and style sheets are not text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:  # the parser is inside <script> or <style>
            self.parts.append(data)


def _without_markup(text: str) -> str:
    parser = _Text()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)
