"""Hooks of mkdocs: pages of the site that stand above docs/, and links between them and docs/.

On the site CHANGELOG.md, CONTRIBUTING.md and SECURITY.md lie beside the pages of docs/. A link to any other file above
docs/, such as a source file, is shown as its name.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
ABOVE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
_LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)+|(?=[\w.]))([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages above docs/ to the site."""
    for name in ABOVE:
        content = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=_LINK.sub(_from_root, content)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links that leave docs/ at the site's pages."""
    return _LINK.sub(_from_docs, markdown)


def _from_root(match: re.Match[str]) -> str:
    label, up, target, anchor = match[1], match[2], match[3], match[4] or ""
    if up or "://" in target or target in ABOVE:
        return match[0]
    return f"[{label}]({target.removeprefix('docs/')}{anchor})" if target.startswith("docs/") else label


def _from_docs(match: re.Match[str]) -> str:
    label, up, target, anchor = match[1], match[2], match[3], match[4] or ""
    if not up:
        return match[0]
    return f"[{label}]({up.removeprefix('../')}{target}{anchor})" if target in ABOVE else label
