"""Write docs/api.md, the Python API, from signatures and docstrings: `python docs/api_page.py`.

The page holds the names that `lorary.registry` exports, the errors, and the classes that methods of Registry return.
The sources are parsed, not imported, so that defaults and comments of fields appear as they are written. A test
compares the page with the output of this script.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
WIDTH = 100  # of a signature, before it is written with one parameter a line
_HEAD = """# The Python API

Written by `python docs/api_page.py` from the docstrings: change those, not this page.

```python
from lorary.registry import {}
```

Importing it is fast: torch and transformers are imported when a model is first needed. The classes under
[Results](#results) are what methods of `Registry` return; there is no need to import them.
"""
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):")
_ENTRY = re.compile(r"(\*{0,2}[\w, ]+): (.*)", re.DOTALL)


@dataclass(frozen=True)
class Definition:
    """A class, or the value of a type alias, with the module that defines it."""

    name: str
    module: str
    node: ast.ClassDef | ast.expr


@cache
def parse(module: str) -> tuple[ast.Module, list[str]]:
    """Return the syntax tree and the lines of a module of ours, given its dotted name below `lorary`."""
    path = ROOT.joinpath(*module.split("."))
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    return ast.parse(text), text.splitlines()


def find(module: str, name: str) -> Definition | None:
    """Return the class or type alias that `name` means in a module; None if it is not ours."""
    for node in ast.walk(parse(module)[0]):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Definition(name, module, node)
        if isinstance(node, ast.ImportFrom) and node.level:
            origin = next((alias.name for alias in node.names if (alias.asname or alias.name) == name), None)
            if origin:
                package = module if ROOT.joinpath(*module.split(".")).is_dir() else module.rpartition(".")[0]
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                return find(".".join([*parts, node.module or ""]).strip("."), origin)
    for node in parse(module)[0].body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return Definition(name, module, node.value)
    return None


def unquoted(annotation: ast.expr) -> ast.expr:
    """Return an annotation without the quotes of forward references."""

    class Unquote(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.expr:  # noqa: N802
            return ast.parse(node.value, mode="eval").body if isinstance(node.value, str) else node

        def visit_Subscript(self, node: ast.Subscript) -> ast.expr:  # noqa: N802
            is_literal = ast.unparse(node.value) == "Literal"
            return node if is_literal else ast.Subscript(self.visit(node.value), self.visit(node.slice), node.ctx)

    return Unquote().visit(ast.parse(ast.unparse(annotation), mode="eval").body)


def mentioned(module: str, annotation: ast.expr | None) -> Iterator[Definition]:
    """Yield our classes that an annotation names, also through type aliases."""
    if annotation is None:
        return
    for node in ast.walk(unquoted(annotation)):
        definition = find(module, node.id) if isinstance(node, ast.Name) else None
        if definition is None:
            continue
        if isinstance(definition.node, ast.ClassDef):
            yield definition
        else:
            yield from mentioned(definition.module, definition.node)


def is_public(name: str) -> bool:
    """Return whether a name belongs on the page."""
    return not name.startswith("_")


def functions_of(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """Return the public methods and properties of a class, in the order in which they are written."""
    functions = [item for item in node.body if isinstance(item, ast.FunctionDef) and is_public(item.name)]
    return [item for item in functions if "overload" not in map(ast.unparse, item.decorator_list)]


def fields_of(node: ast.ClassDef) -> list[ast.AnnAssign]:
    """Return the public fields of a dataclass."""
    return [item for item in node.body if isinstance(item, ast.AnnAssign) and is_public(ast.unparse(item.target))]


def results(registry: Definition, exported: set[str]) -> list[Definition]:
    """Return the classes that methods of Registry return, and those of their fields, by name."""
    found: dict[str, Definition] = {}

    def collect(module: str, annotation: ast.expr | None) -> None:
        for definition in mentioned(module, annotation):
            node = definition.node
            if definition.name in exported or definition.name in found or not isinstance(node, ast.ClassDef):
                continue
            found[definition.name] = definition
            for field in fields_of(node):
                collect(definition.module, field.annotation)

    assert isinstance(registry.node, ast.ClassDef)
    for function in functions_of(registry.node):
        collect(registry.module, function.returns)
    return [found[name] for name in sorted(found)]


def aliases(registry: Definition) -> list[str]:
    """Return the source lines of the type aliases in the signatures of Registry, by name."""
    assert isinstance(registry.node, ast.ClassDef)
    found: dict[str, str] = {}

    def collect(module: str, annotation: ast.expr | None) -> None:
        for node in ast.walk(unquoted(annotation)) if annotation else ():
            definition = find(module, node.id) if isinstance(node, ast.Name) else None
            if definition and definition.name not in found and not isinstance(definition.node, ast.ClassDef):
                lines = parse(definition.module)[1]
                found[definition.name] = "\n".join(lines[definition.node.lineno - 1 : definition.node.end_lineno])
                collect(definition.module, definition.node)

    for function in functions_of(registry.node):
        arguments = function.args
        for argument in [*arguments.args, *arguments.kwonlyargs]:
            collect(registry.module, argument.annotation)
        collect(registry.module, function.returns)
    return [found[name] for name in sorted(found)]


# --- markdown ---


def page() -> str:
    """Return docs/api.md."""
    assignments = [node for node in parse("registry")[0].body if isinstance(node, ast.Assign)]
    names = next(ast.literal_eval(node.value) for node in assignments if ast.unparse(node.targets[0]) == "__all__")
    exported = {name: find("registry", name) for name in names}
    classes = {name: found for name, found in exported.items() if found and isinstance(found.node, ast.ClassDef)}
    order = sorted(classes, key=lambda name: (name != "Registry", name == "LoraryError"))
    parts = [_HEAD.format(", ".join(names))]
    for name in order:
        parts.append(class_section(classes[name], level=2))
        if name == "LoraryError":
            parts.append(error_table())
    parts.append("## Types\n\nShort names in the signatures above.\n")
    parts.append(code("\n".join(aliases(classes["Registry"]))))
    parts.append("## Results\n\nWhat methods of `Registry` return, by name.\n")
    parts += [class_section(found, level=3) for found in results(classes["Registry"], set(names))]
    return "\n".join(parts)


def class_section(found: Definition, *, level: int) -> str:
    """Return a class with its fields, methods and properties."""
    node = found.node
    assert isinstance(node, ast.ClassDef)
    heading, below = "#" * level, "#" * (level + 1)
    parts = [f"{heading} {found.name}\n", prose(node)]
    fields = fields_of(node)
    if fields:
        lines = parse(found.module)[1]
        shown = [line[node.col_offset :] for line in lines[node.lineno - 1 : fields[-1].end_lineno]]
        start = fields[0].lineno - node.lineno
        decorators = [f"@{ast.unparse(item)}" for item in node.decorator_list]
        parts.append(code("\n".join([*decorators, shown[0], *shown[start:]])))
    init = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    if init:
        parts.append(code(signature(found.name, init)))
    for function in functions_of(node):
        parts.append(f"{below} {found.name}.{function.name}\n" if level == 2 else f"`{found.name}.{function.name}`\n")
        parts += [code(head(function)), prose(function)]
    return "\n".join(parts)


def error_table() -> str:
    """Return the subclasses of LoraryError with their exit codes."""
    rows = ["Its subclasses, in `lorary.domains.errors`:\n", "| | exit code | |", "|---|---|---|"]
    for node in parse("domains.errors")[0].body:
        if isinstance(node, ast.ClassDef) and node.name != "LoraryError":
            codes = [ast.unparse(item.value) for item in node.body if isinstance(item, ast.Assign)]
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            about = (ast.get_docstring(node) or "").splitlines()[0]
            rows.append(f"| `{node.name}({bases})` | {codes[0] if codes else 'as its base'} | {about} |")
    return "\n".join(rows) + "\n"


def head(function: ast.FunctionDef) -> str:
    """Return a method's signature with `@classmethod` or `@property` above it."""
    marks = [f"@{ast.unparse(mark)}" for mark in function.decorator_list]
    if {"@property", "@cached_property"} & set(marks):
        returns = ast.unparse(unquoted(function.returns)) if function.returns else "None"
        return f"{function.name}: {returns}  # property"
    return "\n".join([*(mark for mark in marks if mark == "@classmethod"), signature(f"def {function.name}", function)])


def signature(name: str, function: ast.FunctionDef) -> str:
    """Return `name(parameters) -> type`, on one line if it fits."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args][1:]  # without self or cls
    padded = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    shown = [
        parameter(*pair) for pair in zip(positional, padded[-len(positional) :] if positional else [], strict=True)
    ]
    if arguments.vararg:
        shown.append("*" + parameter(arguments.vararg, None))
    elif arguments.kwonlyargs:
        shown.append("*")
    shown += [parameter(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        shown.append("**" + parameter(arguments.kwarg, None))
    returns = (
        f" -> {ast.unparse(unquoted(function.returns))}" if function.returns and function.name != "__init__" else ""
    )
    line = f"{name}({', '.join(shown)}){returns}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {text}," for text in shown), f"){returns}"])


def parameter(argument: ast.arg, default: ast.expr | None) -> str:
    """Return a parameter as it stands in a signature."""
    text = argument.arg
    if argument.annotation:
        text += f": {ast.unparse(unquoted(argument.annotation))}"
    if default is not None:
        text += (" = " if argument.annotation else "=") + ast.unparse(default).replace("'", '"')
    return text


def prose(node: ast.ClassDef | ast.FunctionDef) -> str:
    """Return a docstring in Google form as markdown."""
    text = ast.get_docstring(node) or ""
    blocks = []
    for block in text.split("\n\n"):
        title, _, rest = block.partition("\n")
        if _SECTION.fullmatch(title):
            blocks.append(f"{title}\n\n" + "\n".join(f"- {entry}" for entry in entries(inspect.cleandoc(rest))))
        else:
            blocks.append(block)
    return "\n\n".join(blocks) + "\n"


def entries(section: str) -> Iterator[str]:
    """Yield the entries of a docstring's section, each on one line, its name as code."""
    for entry in re.split(r"\n(?!\s)", section):
        line = " ".join(entry.split())
        match = _ENTRY.fullmatch(line)
        yield f"`{match[1]}`: {match[2]}" if match else line


def code(text: str) -> str:
    """Return a block of Python."""
    return f"```python\n{text}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
