"""Markup: text stays text, the page's policy names exactly its style and its script."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorary.cli.report.markup import Html, document, join, tag
from lorary.cli.show.safe_text import clean


class Reader(HTMLParser):
    """What a parser sees: elements with attributes, and text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@given(text=st.text(), value=st.text())
def test_any_text_comes_back_and_adds_no_element(text: str, value: str):
    read = Reader(tag("p", text, title=value))

    assert read.elements == [("p", {"title": clean(value)})]
    assert read.text == clean(text)


def test_attributes_may_be_there_or_not():
    assert tag("th", "A", hidden=True, title=None, scope="col") == '<th hidden scope="col">A</th>'


def test_children_may_be_lists_and_nothing():
    assert tag("p", [tag("b", "x"), " & "], None, "y") == "<p><b>x</b> &amp; y</p>"
    assert isinstance(join("a", tag("br")), Html)


def test_joined_strings_are_text_again():
    assert tag("p", "<b>" + tag("i", "x")) == "<p>&lt;b&gt;&lt;i&gt;x&lt;/i&gt;</p>"


def test_the_policy_allows_this_style_and_this_script_only():
    page = document(tag("p", "ä"), title="<t>", style="p { color: red }", script="'use strict';")

    policy = next(a["content"] for _, a in Reader(page).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for name, text in (("style-src", "p { color: red }"), ("script-src", "'use strict';")):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert re.search(rf"{name} 'sha256-{re.escape(digest)}';", policy)


@pytest.mark.parametrize("parts", [{"style": "</style>"}, {"script": "x = '</SCRIPT>'"}, {"script": "<!-- x"}])
def test_style_and_script_cannot_end_early(parts: dict[str, str]):
    with pytest.raises(ValueError, match="end of their element"):
        document(title="t", **({"style": "", "script": ""} | parts))
