"""The one place where errors end: every failure becomes three lines on stderr and an exit code.

A subclass of TyperGroup, so that it holds under typer's CliRunner as well as in a shell.
"""

import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from ..domains.errors import LoraryError
from .show import output

INTERRUPTED = 130
DEBUG = "LORARY_DEBUG"  # set to 1: errors come with their traceback
# commands that go on where they were interrupted
RESUMING = ("init", "add-domain", "retrain", "quickstart", "report", "pull")


class ReportingGroup(TyperGroup):
    """The top of the command tree; its commands raise, it reports."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs the command that the arguments name and exits with its code."""
        words = list(sys.argv[1:] if args is None else args)
        name = Path(sys.argv[0]).stem
        with _reported(words):
            code = super().main(
                args=words or ["--help"],
                prog_name=name if name == "lorary" else "registry",
                complete_var=complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )
            if code == INTERRUPTED:  # typer has made it out of a KeyboardInterrupt
                raise KeyboardInterrupt
        sys.exit(code or 0)


@contextmanager
def _reported(words: list[str]) -> Iterator[None]:
    """Reports what is raised inside and exits with its code."""
    try:
        yield
    except (KeyboardInterrupt, typer.Abort):
        _fail(_interrupted(words), words)
    except LoraryError as error:
        _fail(_foreseen(error), words)
    except typer.TyperException as error:
        _fail(_wrong_usage(error), words)
    except Exception as error:
        _fail(_unexpected(error), words)


def _fail(record: dict[str, Any], words: list[str]) -> None:
    if os.environ.get(DEBUG):
        traceback.print_exc()
    as_json = "--json" in words
    if record["exit"] == INTERRUPTED and not as_json:
        output.tell(record["message"])  # what a person did is no error
    else:
        output.failure(record, as_json=as_json)
    sys.exit(record["exit"])


def _foreseen(error: LoraryError) -> dict[str, Any]:
    kind = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).lower()
    return _record(kind, error.exit_code, error.message, error.cause, error.fix)


def _wrong_usage(error: typer.TyperException) -> dict[str, Any]:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "registry"
    message = error.format_message().replace(": Value error, ", ": ")  # words of the library that checks values
    return _record("usage", error.exit_code, message, None, f"see {path} --help")


def _unexpected(error: Exception) -> dict[str, Any]:
    detail = " ".join(str(error).split())
    message = f"{type(error).__name__}: {detail}" if detail else type(error).__name__
    return _record("unexpected", 1, message, None, f"see the traceback: repeat the command with {DEBUG}=1 before it")


def _interrupted(words: list[str]) -> dict[str, Any]:
    if any(word in RESUMING for word in words[:1]):
        return _record("interrupted", INTERRUPTED, "Interrupted. Repeat the same command to resume.", None, None)
    return _record("interrupted", INTERRUPTED, "Interrupted.", None, None)


def _record(code: str, exit_code: int, message: str, cause: str | None, fix: str | None) -> dict[str, Any]:
    return {"code": code, "exit": exit_code, "message": message, "cause": cause, "fix": fix}
