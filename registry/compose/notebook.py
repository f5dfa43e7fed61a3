"""Render small HTML tables for `_repr_html_`: text is escaped, and colours are left to the notebook's theme."""

from collections.abc import Iterable, Sequence
from html import escape

MAX_ROWS = 50  # of a table; the rest is counted in its last row


def html_table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as HTML with every cell escaped, shortened to `MAX_ROWS` rows."""
    body = [f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows]
    if len(body) > MAX_ROWS:
        rest = len(body) - MAX_ROWS
        body[MAX_ROWS:] = [f'<tr><td colspan="{len(headings)}">and {rest} more</td></tr>']
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    return (
        f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )
