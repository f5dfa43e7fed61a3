"""Make untrusted text safe for a terminal: file names, data, and what a model generates."""

import re

_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_].*?(?:\x07|\x1b\\|$)|\x1b[ -/]*[0-~]?", re.DOTALL)
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_SURROGATES = re.compile(r"[\ud800-\udfff]")


def clean(text: str) -> str:
    r"""Remove escape sequences, control characters, and characters that change the direction of text.

    Line breaks and tabs stay.

    >>> clean("a\x1b[31mred\x1b[0m\x07 b\r\nc")
    'ared b\nc'
    """
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub("", _ESCAPES.sub("", text)))


def one_line(text: str) -> str:
    r"""Clean the text and put it on one line, for a table cell.

    >>> one_line("a\n\tb")
    'a b'
    """
    return " ".join(clean(text).split()) if re.search(r"[\n\t]", text) else clean(text)
