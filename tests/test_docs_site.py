"""docs/api.md is what its generator writes, and every page of docs/ is in the site's navigation."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def api_page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api_page", ROOT / "docs" / "api_page.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["api_page"] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_api_page_is_up_to_date(api_page: ModuleType):
    stale = "docs/api.md is stale; write it again: .venv/bin/python docs/api_page.py"
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == api_page.page(), stale


def test_api_page_has_every_public_method(api_page: ModuleType):
    from lorary.registry import Registry

    public = [name for name in vars(Registry) if not name.startswith("_")]

    assert public
    assert not [name for name in public if f"### Registry.{name}\n" not in api_page.page()]


def nav_pages(entry: Any) -> set[str]:
    if isinstance(entry, str):
        return {entry}
    return set().union(*map(nav_pages, entry.values() if isinstance(entry, dict) else entry))


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}

    assert nav_pages(nav) - {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"} == pages
