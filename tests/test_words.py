"""Keeps worn-out phrases out of docstrings, comments, messages and pages; docs/style.md says how to write instead."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BANNED = (
    "nobody",
    "whoever",
    "of which",
    "what it says",
    "lets",
    "believe",
    "believed",
    "comes to",
    "told of",
    "of one's own",
    "as ever",
    "knows nothing of",
    "so far has it come",
    "in the numbers in which",
    "at most so many",
    "makes no sense beyond",
)
PATTERN = re.compile(r"\b(" + "|".join(phrase.replace(" ", r"\s+") for phrase in BANNED) + r")\b", re.IGNORECASE)

CODE = ("adapters", "cli", "domains", "registry", "examples")
TEXT_ENDINGS = {".css", ".html", ".j2", ".jinja", ".js", ".md"}  # templates and assets in the code folders
PAGES = ("README.md", "SECURITY.md", "CONTRIBUTING.md")
HISTORY = {"docs/log.md"}  # CHANGELOG.md and the log of experiments are not rewritten
BUNDLED = "domains/builtin/"  # corpora, not our prose


def python_texts(source: str) -> Iterator[tuple[int, str]]:
    """The string literals and comments of a file, each with its first line; lines of one comment belong together."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    block: list[str] = []
    first = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if first + len(block) != token.start[0]:
                yield first, "\n".join(block)
                block, first = [], token.start[0]
            block.append(token.string.lstrip("#"))
    yield first, "\n".join(block)


def texts(path: Path) -> Iterator[tuple[int, str]]:
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from python_texts(content)
    else:
        yield 1, content


def found(path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT).as_posix()}:{line + text.count(chr(10), 0, match.start())} {match[0]!r}"
        for line, text in texts(path)
        for match in PATTERN.finditer(text)
    ]


def scanned() -> Iterator[Path]:
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in TEXT_ENDINGS | {".py"} and not path.relative_to(ROOT).as_posix().startswith(BUNDLED):
                yield path
    yield from (ROOT / page for page in PAGES if (ROOT / page).exists())
    for path in sorted((ROOT / "docs").rglob("*.md")):
        if path.relative_to(ROOT).as_posix() not in HISTORY:
            yield path


def place(path: Path) -> str:
    """The folder of a source file, or the page."""
    relative = path.relative_to(ROOT)
    return relative.as_posix() if path.suffix == ".md" else relative.parent.as_posix()


@cache
def problems() -> dict[str, list[str]]:
    by_place: dict[str, list[str]] = {}
    for path in scanned():
        by_place.setdefault(place(path), []).extend(found(path))
    return by_place


@pytest.mark.parametrize("where", sorted({place(path) for path in scanned()}))
def test_no_banned_phrase(where: str):
    assert not problems()[where], "say it plainly; docs/style.md has the words"


def test_phrases_are_found_wherever_text_stands():
    source = (
        '"""Nobody."""\nx = f"so {1} lets"  # one of\n# Which\ny = 1  # of\nz = 2\n# of\n# which\nlets_go = "inlets"\n'
    )

    hits = [match[0] for _, text in python_texts(source) for match in PATTERN.finditer(text)]

    assert sorted(hit.lower().split()[0] for hit in hits) == ["lets", "nobody", "of", "of"]
