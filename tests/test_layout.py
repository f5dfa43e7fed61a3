"""Guards the shape of the project: what is shipped, which way imports point, what a file may do.

Each test names the file and the line, so that a failure reads as a correction. The rules are explained in
docs/style.md and docs/architecture.md. Files are parsed, not imported, except for doctests and the front door.
"""

import ast
import doctest
import graphlib
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

LAYERS = ("domains", "adapters", "registry", "cli")  # the folders at the top
# Lowest first: a room imports from itself and from rooms above it in this list. The most specific entry counts.
ROOMS = (
    "domains",
    "domains/data",
    "domains/statistics",
    "domains/scoring",
    "adapters",
    "adapters/kernels",
    "adapters/router",
    "adapters/layer",
    "adapters/training",
    "registry/store",
    "registry/pack",
    "registry/hub",
    "registry/base",
    "registry/compose",
    "registry/measure",
    "registry/learn",
    "registry/interop",
    "registry/maintenance",
    "registry",
    "cli/show",
    "cli/report",
    "cli",
    "cli/commands",
    "cli/app.py",
    "cli/reference.py",
    "cli/__main__.py",
)
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
HEAVY = {"torch", "transformers", "faiss", "huggingface_hub", "numpy", "accelerate", "datasets", "tokenizers"}
PICKLING = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
IMPORT_NAMES = {
    "faiss": "faiss-cpu",
    "yaml": "pyyaml",
}  # where a package is imported under another name than it is installed under

# --- the source, parsed once ---


@dataclass(frozen=True)
class Source:
    """One Python file of ours."""

    path: str  # relative to the root, with forward slashes
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """The dotted import name, `lorary.adapters.bank`; a folder's `__init__.py` has the folder's name."""
        return ".".join(["lorary", *Path(self.path).with_suffix("").parts]).removesuffix(".__init__")

    @property
    def layer(self) -> str:
        return self.path.split("/")[0]

    @property
    def room(self) -> str:
        """The most specific entry of ROOMS that holds this file."""
        return max((room for room in ROOMS if f"{self.path}/".startswith(f"{room}/")), key=len)

    @property
    def is_folder(self) -> bool:
        return self.path.endswith("__init__.py")

    def at(self, node: ast.AST) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}"


def parse(folder: str) -> list[Source]:
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        relative, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        if not relative.startswith("domains/builtin/"):  # bundled data, not modules
            found.append(Source(relative, text, ast.parse(text)))
    return found


SOURCES = [source for layer in LAYERS for source in parse(layer)]
TESTS = parse("tests")
MODULES = {source.module: source for source in SOURCES}


def imports_of(source: Source, node: ast.AST) -> Iterator[str]:
    """Dotted names that an import statement reaches: `lorary.adapters.bank` (a module of ours) or `torch.nn.Linear`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        start = node.module or ""
        if node.level:
            folder = source.module.split(".")[: None if source.is_folder else -1]
            start = ".".join([*folder[: len(folder) - node.level + 1], *filter(None, [node.module])])
        for alias in node.names:
            name = f"{start}.{alias.name}"
            yield start if start in MODULES and name not in MODULES else name


def all_imports(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every import, also inside functions and under TYPE_CHECKING."""
    return ((node, name) for node in ast.walk(source.tree) for name in imports_of(source, node))


def runs_on_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that Python executes when the module is imported."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        yield node
        pending += ast.iter_child_nodes(node)


@cache
def meanings(source: Source) -> dict[str, str]:
    """What a name stands for in this file: `{"t": "torch", "load": "torch.load"}`."""
    known = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return known


def uses(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """Every plain or dotted name that is read, by its full name: `torch.load`, `print`, `sys.stdout.write`."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = ast.unparse(node)
            if re.fullmatch(r"[\w.]+", name):
                first, dot, rest = name.partition(".")
                yield node, meanings(source).get(first, first) + dot + rest


# --- what is shipped ---


def test_every_source_folder_is_shipped():
    on_disk = {"lorary." + Path(source.path).parent.as_posix().replace("/", ".") for source in SOURCES}

    settings = PROJECT["tool"]["setuptools"]

    assert set(settings["packages"]) == {"lorary", *on_disk}, "pyproject.toml: one package for each folder"
    assert settings["package-dir"] == {"lorary": ".links"} | {f"lorary.{layer}": layer for layer in sorted(LAYERS)}


def test_every_source_folder_is_a_typed_package():
    expected = {(ROOT / source.path).with_name("__init__.py") for source in SOURCES}
    expected |= {ROOT / layer / "py.typed" for layer in LAYERS}

    assert not [path for path in expected if not path.is_file()]


def test_type_checkers_find_the_package():
    if (ROOT / "PKG-INFO").exists():
        pytest.skip("an sdist carries no links")

    for layer in LAYERS:
        assert (ROOT / ".links" / "lorary" / layer).resolve() == ROOT / layer
    assert (ROOT / ".links" / "lorary" / "__init__.py").resolve() == ROOT / ".links" / "__init__.py"


def test_every_third_party_import_is_a_declared_dependency():
    extras = PROJECT["project"]["optional-dependencies"]
    declared = {
        re.split(r"[^\w-]", requirement)[0].lower().replace("_", "-")
        for requirement in chain(
            PROJECT["project"]["dependencies"], *(extras[name] for name in extras if name != "dev")
        )
    }
    known = sys.stdlib_module_names | set(LAYERS) | {"lorary", "__future__"}

    problems = [
        f"{source.at(node)} imports {name}, which pyproject.toml does not name"
        for source in SOURCES
        for node, name in all_imports(source)
        if (top := name.split(".")[0]) not in known and IMPORT_NAMES.get(top, top).replace("_", "-") not in declared
    ]

    assert not problems


def test_nothing_that_git_ignores_is_tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")

    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    tracked = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    assert not tracked.splitlines()


# --- which way imports point ---


def test_every_folder_is_a_room():
    folders = {Path(source.path).parent.as_posix() for source in SOURCES}

    assert folders == {room for room in ROOMS if not room.endswith(".py")}


def test_imports_point_down():
    rank = {room: position for position, room in enumerate(ROOMS)}

    problems = [
        f"{source.at(node)} in {source.room} imports {name} of {MODULES[name].room}, which is higher in ROOMS"
        for source in SOURCES
        for node, name in all_imports(source)
        if name in MODULES and rank[MODULES[name].room] > rank[source.room]
    ]

    assert not problems


def test_no_modules_import_each_other_in_a_circle():
    graph = {
        source.module: {
            name
            for node in runs_on_import(source.tree)
            for name in imports_of(source, node)
            if name in MODULES and name != source.module
        }
        for source in SOURCES
    }

    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


def test_nobody_imports_the_folders_by_their_top_level_name():
    problems = [
        f"{source.at(node)} imports {name}: its name is lorary.{name}"
        for source in SOURCES + TESTS
        for node, name in all_imports(source)
        if name.split(".")[0] in LAYERS
    ]

    assert not problems


def test_imports_between_our_files_are_relative():
    problems = [
        f"{source.at(node)} imports {name}: inside the four folders imports are relative"
        for source in SOURCES
        for node, name in all_imports(source)
        if name.split(".")[0] == "lorary" and not getattr(node, "level", 0)
    ]

    assert not problems


# --- how files are named ---


def test_file_names_say_what_is_inside():
    vague = [source.path for source in SOURCES if VAGUE_NAMES & {part.strip("_") for part in source.module.split(".")}]

    assert not vague, "a function without a home belongs to the file of its first caller"


def is_front_door_statement(node: ast.stmt) -> bool:
    """Imports, `__all__` and the like, and module-level `__getattr__` and `__dir__`."""
    if isinstance(node, ast.FunctionDef):
        return node.name in {"__getattr__", "__dir__"}
    is_typing_block = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return is_typing_block or isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.AnnAssign)


@pytest.mark.parametrize("source", [s for s in SOURCES if s.is_folder], ids=lambda source: source.path)
def test_init_files_are_light(source: Source):
    assert ast.get_docstring(source.tree), f"{source.path} says in one sentence what the folder is for"
    if source.path == "registry/__init__.py":
        odd = [source.at(node) for node in source.tree.body[1:] if not is_front_door_statement(node)]
        assert not odd, "the front door only passes names on"
    else:
        assert len(source.tree.body) == 1, f"{source.path} holds more than its docstring"


@pytest.mark.parametrize("module", ["lorary", "lorary.registry"])
def test_front_door_names_are_sorted_and_real(module: str):
    front_door = importlib.import_module(module)
    names = list(front_door.__all__)

    assert names == sorted(names) == importlib.import_module("lorary.registry").__all__
    assert not [name for name in names if not hasattr(front_door, name)]
    with pytest.raises(AttributeError, match="no_such_name"):
        front_door.no_such_name  # noqa: B018


# --- what files may do ---

HELP = "import sys; from lorary.cli.app import main; sys.argv = ['registry', '--help']; main()"
STARTS = {"front door": "import lorary.registry", "program": "import lorary.cli.app", "help": HELP}


@pytest.mark.parametrize("statement", STARTS.values(), ids=STARTS)
def test_commands_that_compute_nothing_start_light(statement: str):
    if "cli.app" in statement and "lorary.cli.app" not in MODULES:
        pytest.skip("cli/app.py is not written yet")
    report = f"import atexit, sys; atexit.register(lambda: print(*({HEAVY} & set(sys.modules)), file=sys.stderr))"

    command = [sys.executable, "-c", f"{report}\n{statement}"]
    done = subprocess.run(command, cwd=ROOT / "tests", check=False, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    assert not done.stderr.split(), f"{statement!r} imports what takes seconds"


def is_unsafe(name: str) -> bool:
    parts = name.split(".")
    first, last = parts[0], parts[-1]
    by_torch = first == "torch" and last in {"load", "save"}
    by_reader = last in {"read_pickle", "read_index", "read_index_binary", "unsafe_load"} or name == "yaml.load"
    return by_torch or by_reader or first in PICKLING or name.removeprefix("builtins.") in {"eval", "exec"}


def test_nothing_is_unpickled_or_evaluated():
    problems = [
        f"{source.at(node)} uses {name}: safetensors and JSON only, and no code from text"
        for source in SOURCES
        for node, name in [*all_imports(source), *uses(source)]
        if is_unsafe(name)
    ]
    problems += [
        f"{source.at(node.value)} passes allow_pickle"
        for source in SOURCES
        for node in ast.walk(source.tree)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    ]

    assert not problems


PRINTING = re.compile(r"(builtins\.)?print|pprint\.pp(rint)?|sys\.(__)?std(out|err)(__)?\.write|typer\.(s?echo|secho)")


def test_only_one_file_prints_and_knows_rich():
    problems = [
        f"{source.at(node)} uses {name}: cli/show/output.py prints, all others raise, return or log"
        for source in SOURCES
        if source.path != "cli/show/output.py"
        for node, name in [*all_imports(source), *uses(source)]
        if name.split(".")[0] == "rich" or PRINTING.fullmatch(name)
    ]

    assert not problems


@pytest.mark.parametrize("module", [s.module for s in SOURCES if ">>>" in s.text])
def test_examples_in_docstrings_hold(module: str):
    result = doctest.testmod(importlib.import_module(module))

    assert result.attempted, f"{module} has >>> where doctest does not see it"
    assert not result.failed
