"""`registry report --svg`: one SVG file with every cell and every share, the same twice."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from lorary.cli.report.formatting import format_value
from lorary.cli.report.svg import retention_svg
from lorary.cli.report.templates import read_asset
from lorary.registry import Registry

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def report(store):
    return Registry.open(store).retention(questions=False)


def test_a_report_is_written_as_svg(run, store, tmp_path, report):
    result = run("report", "--svg", "retention.svg", "--no-questions", store=store)

    assert result.exit_code == 0, result.stderr
    drawing = (tmp_path / "retention.svg").read_text(encoding="utf-8")
    assert drawing == retention_svg(report)
    root = ElementTree.fromstring(drawing)
    assert root.tag == f"{SVG}svg"
    texts = [element.text for element in root.iter(f"{SVG}text")]
    for i in range(len(report.steps)):
        for j in range(len(report.columns)):
            if (value := report.bits.value(i, j)) is not None:
                assert format_value(value, "bits/byte") in texts
    assert {"base", "+ general", "+ medicine", "+ legal", "medicine", "legal"} <= set(texts)


def test_every_cell_has_the_colour_of_its_level_and_learned_cells_are_outlined(report):
    root = ElementTree.fromstring(retention_svg(report))

    cells = [element for element in root.iter(f"{SVG}rect") if element.find(f"{SVG}title") is not None]
    measured = [(i, j) for i in range(4) for j in range(3) if report.bits.value(i, j) is not None]
    assert len(cells) == len(measured)
    assert all(re.fullmatch(r"h[0-8]( own)?( worse)?", element.get("class", "")) for element in cells)
    assert sum("own" in element.get("class", "") for element in cells) == 3


def test_it_stays_inside_its_frame_and_loads_nothing(report):
    drawing = retention_svg(report)

    root = ElementTree.fromstring(drawing)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for element in root.iter(f"{SVG}rect"):
        if element.get("x"):
            assert 0 <= float(element.get("x", 0)) <= width - float(element.get("width", 0))
            assert 0 <= float(element.get("y", 0)) <= height - float(element.get("height", 0))
    assert not {element.tag.removeprefix(SVG) for element in root.iter()} & {"image", "use", "script", "a", "link"}
    assert "url(" not in drawing
    assert "href" not in drawing


def test_the_same_report_gives_the_same_bytes(report):
    assert retention_svg(report) == retention_svg(report)


def test_the_colours_are_the_light_ones_of_the_page():
    page, picture = read_asset("report.css"), read_asset("picture.css")

    for level in range(9):
        light = re.search(rf"\.h{level} {{ background: light-dark\((#\w+), .*color: light-dark\((#\w+),", page)
        drawn = re.search(rf"\.h{level} {{ fill: (#\w+); }} \.t{level} {{ fill: (#\w+); }}", picture)
        assert light is not None
        assert drawn is not None
        assert drawn.groups() == light.groups()


def test_what_another_domain_harmed_is_red_and_said(harmed):
    drawing = retention_svg(harmed)
    root = ElementTree.fromstring(drawing)

    red = [element for element in root.iter(f"{SVG}rect") if "worse" in element.get("class", "").split()]
    assert [element.findtext(f"{SVG}title") for element in red] == [
        "medicine, + legal: 1.540, worse",
        "medicine, + legal: 67 %, worse",
    ]
    headline = next(element for element in root.iter(f"{SVG}text") if "headline" in element.get("class", ""))
    assert "worse: medicine" in (headline.text or "")
    assert "bad" in headline.get("class", "")
    assert "retention: not measurable" in drawing
    assert ".worse { stroke: #d01b13" in read_asset("picture.css")
