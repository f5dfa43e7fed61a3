"""Write result files of routing.py into the part of a page that is between two comments.

python tests/benchmarks/routing_page.py docs/benchmarks.md docs/results/routing-*.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- routing: begin -->", "<!-- routing: end -->"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("results", type=Path, nargs="*")
    arguments = parser.parse_args()
    write_page(arguments.page, arguments.results)


def tables(result: dict[str, Any]) -> list[str]:
    """Return the Markdown of a result file."""
    lines = [f"{key}: {value}" for key, value in result["environment"].items()]
    found = [", ".join(lines) + "."]
    for title, rows in result.items():
        if title == "environment":
            continue
        columns = list(dict.fromkeys(key for row in rows for key in row))
        found += ["", f"**{title}**", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        found += [f"| {' | '.join(_cell(row.get(column, '')) for column in columns)} |" for row in rows]
    return found


def page_block(results: list[Path]) -> str:
    """Return the part of docs/benchmarks.md that is made of result files."""
    lines = [BEGIN]
    for path in results:
        lines += ["", f"### {path.stem}", "", *tables(json.loads(path.read_text(encoding="utf-8")))]
    return "\n".join([*lines, "", END])


def write_page(page: Path, results: list[Path]) -> None:
    """Replace the generated part of a page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(before + page_block(results) + after, encoding="utf-8")


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
