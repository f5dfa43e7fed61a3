"""docs/reliability.md, made of the marks of the tests: `python tests/registry/test_reliability.py` writes it."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
TESTS = FOLDER.parent
PAGE = FOLDER.parents[1] / "docs" / "reliability.md"
MODULES = ("test_silent_failures", "test_silent_failures_of_files")
HEAD = """# Silent failures

Written by `python tests/registry/test_reliability.py` from the marks of the tests: change those, not this page.

Each row is a test that shows both sides: what the installed tool does (PEFT, safetensors, faiss and huggingface_hub at
the versions in [constraints.txt](../constraints.txt)), and what lorary does. A row with *report* is about a tool that
the tests do not run: there only our side is tested.

| Case | Today | lorary | Test |
|---|---|---|---|
"""
OWN_HEAD = """

## Our own

What earlier versions of lorary did silently wrong, and the test that holds it now. Figures are differences in a logit.

| Case | Before | Now | Test |
|---|---|---|---|
"""


def rows() -> Iterator[str]:
    """A row for each marked test, in the order of the files."""
    for name in MODULES:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for test, function in vars(module).items():
            for mark in getattr(function, "pytestmark", ()) if test.startswith("test_") else ():
                if mark.name == "silent_failure":
                    yield "| {} | {theirs} | {ours} | `{test}` |".format(*mark.args, **mark.kwargs, test=test)


def own_rows() -> Iterator[str]:
    """A row for each test with the mark `own_failure`, wherever it is; read without importing the tests."""
    for path in sorted(TESTS.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "own_failure" not in text:
            continue
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            for mark in function.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.own_failure":
                    case, *rest = map(ast.literal_eval, [*mark.args, *(word.value for word in mark.keywords)])
                    assert [word.arg for word in mark.keywords] == ["before", "now"]
                    place = path.relative_to(TESTS.parent).as_posix()
                    yield f"| {case} | {' | '.join(rest)} | `{function.name}` in {place} |"


def page() -> str:
    """docs/reliability.md."""
    table, own = list(rows()), list(own_rows())
    counts = f"\n\n{len(table)} cases of others, {len(own)} of our own. Exit codes are listed in [cli.md](cli.md).\n"
    return HEAD + "\n".join(table) + OWN_HEAD + "\n".join(own) + counts


def test_the_page_says_what_the_tests_show() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/registry/test_reliability.py"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
