"""Write docs/cli.md from the help texts: `python -m lorary.cli.reference`. A test fails if the page is stale."""

import re
from pathlib import Path

import typer
from typer.core import TyperGroup
from typer.main import get_command

from .app import app
from .errors import RESUMING

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
_HEAD = """# The command line

Generated from the help texts by `python -m lorary.cli.reference`; do not edit.

`registry` is also installed as `lorary`. Every command takes `--help`.

- **Results** go to stdout: a table on a terminal, tab-separated values in a pipe, and with `--json` exactly one JSON
  document with `"schema": "lorary.cli/1"`. Progress, hints and errors go to stderr; with `--json` as JSON lines.
- **Errors** have three lines: `Error:`, `Cause:` and `Fix:`. Exit codes: 0 success, 1 unexpected error, 2 invalid
  arguments or data, 3 not found, 4 already exists, 5 damaged, 6 incompatible base model or missing device, 7 network,
  8 no disk space, 9 acceptance check or threshold failed, 130 interrupted.
- **The registry** is `--store PATH`, otherwise `$LORARY_STORE`, otherwise the nearest `.lorary` in this folder or
  above, otherwise `~/.local/share/lorary`.
- `$NO_COLOR` turns colours off; `$FORCE_COLOR` draws tables even if stdout is not a terminal; `LORARY_DEBUG=1` shows
  tracebacks and the warnings of the libraries.
- **Interrupting** a command (Ctrl-C) stores no version. These commands resume when they are repeated:
  {}.
""".format(", ".join(f"`{name}`" for name in RESUMING))


def reference() -> str:
    """Return the page."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    commands = [_command(name, command) for name, command in group.commands.items()]
    return "\n".join([_HEAD, *commands])


def _command(name: str, command: object) -> str:
    make = command.make_context  # type: ignore[attr-defined]  # typer exports no type for its commands
    context: typer.Context = make(f"registry {name}", [], resilient_parsing=True)
    described, _, example = context.command.help.partition("\n\nExample: ")  # type: ignore[union-attr]
    usage = (
        " ".join(context.command.get_usage(context).removeprefix("Usage: ").split()).replace("{", "").replace("}", "")
    )
    rows = [record for param in context.command.get_params(context) if (record := param.get_help_record(context))]
    table = [f"| `{_option(name)}` | {_meaning(text)} |" for name, text in rows if not name.startswith("--help")]
    parts = [f"## {name}", described, f"    {usage}", f"Example:\n\n    {example}"]
    return "\n\n".join(parts) + "\n\n| | |\n|---|---|\n" + "\n".join(table) + "\n"


def _option(name: str) -> str:
    return re.sub(r" <\w+>$", "", name).replace("|", "\\|")


def _meaning(text: str) -> str:
    """Return the help of an option, with its default in plain brackets."""
    text = re.sub(r"default: \((.*?)\)", r"default: \1", re.sub(r"; x>=[\d.]+", "", text))
    return re.sub(r"\s+\[x>=[\d.]+\]", "", text).replace("  [", " [").replace("|", "\\|")


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(reference(), encoding="utf-8")
