"""HTML that cannot be broken by what is in it: elements are made by functions, and all text is escaped.

Only `Html` is markup. Any other text that is put into an element, or into an attribute, is text, whoever wrote it.
"""

import base64
import hashlib
from collections.abc import Iterable
from html import escape

from ..show.safe_text import clean

_VOID = {"meta", "br", "hr"}


class Html(str):
    """A piece of markup; made by `tag` and `join`, and of nothing that came from outside."""

    __slots__ = ()


Child = str | Iterable[str] | None


def tag(name: str, *children: Child, **attributes: object) -> Html:
    """One element with its children.

    Args:
        name: Such as td.
        children: Text, markup, lists of both; None is left out.
        attributes: `class_` is class, `data_v` is data-v; True is an attribute without value, None and False are none.

    >>> tag("td", "a < b", class_="n", data_v=0.5)
    '<td class="n" data-v="0.5">a &lt; b</td>'
    """
    written = "".join(map(_attribute, attributes, attributes.values()))
    inside = join(*children)
    return Html(f"<{name}{written}>" if name in _VOID else f"<{name}{written}>{inside}</{name}>")


def join(*children: Child) -> Html:
    """Pieces one after another."""
    return Html("".join(map(_inside, children)))


def document(*body: Child, title: str, style: str, script: str) -> str:
    """A whole page that loads nothing: its policy allows this one style and this one script, and no network at all.

    Args:
        body: What is on it.
        title: Of the window.
        style: CSS; comes from this program only, as does the script.
        script: JavaScript, run when the page is there.

    Raises:
        ValueError: Style or script would end its element too early.
    """
    if "</" in style or "</script" in script.lower() or "<!--" in script:
        raise ValueError("style and script cannot hold the end of their element")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", *body, tag("script", Html(script))), lang="en") + "\n"


def _inside(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return escape(clean(child), quote=False)
    return "".join(map(_inside, child))


def _attribute(name: str, value: object) -> str:
    plain = name.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {plain}" if value is True else f' {plain}="{escape(clean(str(value)))}"'


def _digest(text: str) -> str:
    """As a policy names what it allows (CSP level 2)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
