"""HTML tables for notebooks: escaped and short."""

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from lorary.registry.compose.notebook import MAX_ROWS, html_table

TAGS = {"table", "caption", "thead", "tbody", "tr", "th", "td"}


class Tags(HTMLParser):
    """Collects tags with attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, int]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, len(attrs)))


@given(st.text(), st.text())
def test_no_text_becomes_markup(caption: str, cell: str) -> None:
    page = html_table(caption, [cell], [[cell]])

    assert Tags(page).tags == [(tag, 0) for tag in ("table", "caption", "thead", "tr", "th", "tbody", "tr", "td")]


def test_quotes_and_tags_are_escaped() -> None:
    page = html_table("<b>", ["\"'"], [["<script>alert(1)</script>"]])

    assert "<caption>&lt;b&gt;</caption>" in page
    assert "<th>&quot;&#x27;</th>" in page
    assert "<td>&lt;script&gt;alert(1)&lt;/script&gt;</td>" in page


def test_long_tables_are_shortened() -> None:
    page = html_table("many", ["number", "square"], [(i, i * i) for i in range(MAX_ROWS + 7)])

    assert page.count("<tr>") == 1 + MAX_ROWS + 1
    assert '<td colspan="2">and 7 more</td>' in page
