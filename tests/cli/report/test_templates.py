"""Templates: text stays text, missing names are errors, and the page's policy names its style and script."""

import base64
import hashlib
import re
import tomllib
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError

from lorary.cli.report.grids import Bars, Column, Grid, GridCell
from lorary.cli.report.html import content_policy
from lorary.cli.report.pictures import Picture, Shape, text
from lorary.cli.report.templates import FOLDER, environment
from lorary.cli.show.safe_text import clean

SOURCES = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.jinja")}


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


def rendered(source: str, **context: Any) -> Reader:
    return Reader(environment().from_string(source).render(**context))


@given(inside=st.text(), value=st.text())
def test_any_text_comes_back_and_adds_no_element(inside: str, value: str):
    read = rendered('<p title="{{ value }}">{{ inside }}</p>', inside=inside, value=value)

    assert read.elements == [("p", {"title": clean(value)})]
    assert read.text == clean(inside)


@given(value=st.text(min_size=1))
def test_no_text_of_a_picture_adds_an_element(value: str):
    shapes = (text(value, 1, 2, style=value), Shape(tag="circle", title=value))

    read = rendered(
        '{% from "picture.svg.jinja" import picture %}{{ picture(it) }}',
        it=Picture(title=value, width=3, height=4, style=value, shapes=shapes),
    )

    assert [tag for tag, _ in read.elements] == ["svg", "text", "circle", "title"]
    assert read.elements[0][1]["aria-label"] == clean(value)
    assert read.elements[1][1] == {"x": "1", "y": "2", "class": clean(value)}
    assert read.text == 2 * clean(value)


@given(value=st.text(min_size=1))
def test_no_text_of_a_grid_adds_an_element(value: str):
    cells = (
        GridCell(text=value, style=value, tip=value),
        GridCell(text=value, bars=Bars(path="M4 30v-1", width=8)),
        GridCell(),
    )
    rows = [(value, cells)]
    grid = Grid(name=value, corner=value, columns=[Column(title=value, note=value)], rows=rows, is_wide=True)

    read = rendered('{% from "tables.html.jinja" import grid %}{{ grid(it) }}', it=grid)

    tags = ["div", "table", "thead", "tr", "th", "th", "span", "tbody", "tr", "th", "td", "td", "svg", "path", "span"]
    assert [tag for tag, _ in read.elements] == [*tags, "td"]
    first = next(attributes for tag, attributes in read.elements if tag == "td")
    assert first == {"class": clean(value), "data-t": clean(value)}


def test_a_name_that_is_not_there_is_an_error():
    with pytest.raises(UndefinedError, match="gone"):
        rendered("{{ gone }}")
    with pytest.raises(UndefinedError, match="gone"):
        rendered("{% if it.gone %}x{% endif %}", it=GridCell())


def test_only_our_style_and_script_are_not_escaped():
    unescaped = [word for source in SOURCES.values() for word in re.findall(r"\{\{\s*([^}]*)\|\s*safe\b", source)]

    assert {word.strip() for word in unescaped} == {"style", "script"}
    assert not [name for name, source in SOURCES.items() if "autoescape" in source]


def test_templates_and_assets_are_shipped():
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))

    shipped = {
        path
        for pattern in project["tool"]["setuptools"]["package-data"]["lorary.cli.report"]
        for path in FOLDER.glob(pattern)
    }
    assert shipped == {path for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py"}


@pytest.mark.parametrize("name", SOURCES)
def test_every_attribute_is_quoted(name: str):
    assert not re.search(r"=\s*\{\{", SOURCES[name])


def test_the_policy_allows_this_style_and_this_script_only():
    policy = content_policy(style="p { color: red }", script="'use strict';")

    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for name, content in (("style-src", "p { color: red }"), ("script-src", "'use strict';")):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert re.search(rf"{name} 'sha256-{re.escape(digest)}';", policy)


@pytest.mark.parametrize("parts", [{"style": "</style>"}, {"script": "x = '</SCRIPT>'"}, {"script": "<!-- x"}])
def test_style_and_script_cannot_end_early(parts: dict[str, str]):
    with pytest.raises(ValueError, match="end of their element"):
        content_policy(**({"style": "", "script": ""} | parts))
