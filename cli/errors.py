"""Turn exceptions into three lines on stderr and an exit code.

A subclass of TyperGroup does this, so that it also works under typer's CliRunner.
"""

import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from ..domains.errors import LoraryError
from ..domains.names import is_name
from .show import output

INTERRUPTED = 130
DEBUG = "LORARY_DEBUG"  # set to 1, errors have a traceback
# commands that resume when they are repeated
RESUMING = ("init", "add-domain", "retrain", "quickstart", "report", "pull")

# words of other programs, and what they are here
INSTEAD = {
    "add": "add-domain",
    "rm": "remove",
    "delete": "remove",
    "ls": "list",
    "help": "--help",
    "--version": "version",
    "--lr": "--learning-rate",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
}


class ReportingGroup(TyperGroup):
    """Top-level command group that reports the exceptions of its commands."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command that the arguments name, and exit with its code."""
        words = list(sys.argv[1:] if args is None else args)
        name = Path(sys.argv[0]).stem
        with _reporting(words):
            code = super().main(
                args=words or ["--help"],
                prog_name=name if name == "lorary" else "registry",
                complete_var=complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **extra,
            )
            if code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
                raise KeyboardInterrupt
        sys.exit(code or 0)


@contextmanager
def _reporting(words: list[str]) -> Iterator[None]:
    """Report an exception raised in the context, and exit with its code."""
    try:
        yield
    except (KeyboardInterrupt, typer.Abort):
        _fail(_interrupted_record(words), words)
    except LoraryError as error:
        _fail(_with_correction(_expected_record(error), words), words)
    except typer.TyperException as error:
        _fail(_with_correction(_usage_record(error), words), words)
    except Exception as error:
        _fail(_unexpected_record(error), words)


def _with_correction(record: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """Return the record with the corrected command as its fix, if the error names a word with a known correction."""
    said = record["message"].split("\n", 1)[0]
    corrected = [_corrected(word, record["cause"] or "") if word in said else word for word in words]
    if record["exit"] not in (2, 3) or corrected == words or not all(corrected):
        return record
    otherwise = f"; otherwise: {record['fix']}" if record["fix"] else ""
    return record | {"fix": f"did you mean: {shlex.join(['registry', *corrected])}{otherwise}"}


def _corrected(word: str, cause: str) -> str:
    """Return what a word most likely means: another word for a command, option or type, or a composition's grammar."""
    if word in INSTEAD:
        return INSTEAD[word]
    spec = re.sub(r"\s*[+,;]\s*", "+", word.strip().lower())
    version = re.search(r"@v([1-9][0-9]*)$", spec)
    if version and not re.search(rf"versions: [^.]*\b{version[1]}\b", cause):
        return word
    spec = re.sub(r"@v(?=[1-9][0-9]*$)", "@", spec)
    names = [re.split("[@:]", part)[0] for part in spec.split("+")]
    return spec if all(map(is_name, names)) else word


def _fail(record: dict[str, Any], words: list[str]) -> None:
    if os.environ.get(DEBUG):
        traceback.print_exc()
    as_json = "--json" in words
    if record["exit"] == INTERRUPTED and not as_json:
        output.write_line(record["message"])  # not an error: the user did it
    else:
        output.show_error(record, as_json=as_json)
    sys.exit(record["exit"])


def _expected_record(error: LoraryError) -> dict[str, Any]:
    kind = re.sub(r"(?<!^)(?=[A-Z])", "_", type(error).__name__.removesuffix("Error")).lower()
    return _record(kind, error.exit_code, error.message, error.cause, error.fix)


def _usage_record(error: typer.TyperException) -> dict[str, Any]:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "registry"
    message = error.format_message().replace(": Value error, ", ": ")  # wording of pydantic
    return _record("usage", error.exit_code, message, None, f"see {path} --help")


def _unexpected_record(error: Exception) -> dict[str, Any]:
    detail = " ".join(str(error).split())
    message = f"{type(error).__name__}: {detail}" if detail else type(error).__name__
    return _record("unexpected", 1, message, None, f"to see the traceback, repeat the command with {DEBUG}=1 in front")


def _interrupted_record(words: list[str]) -> dict[str, Any]:
    if any(word in RESUMING for word in words[:1]):
        return _record("interrupted", INTERRUPTED, "Interrupted. Repeat the same command to resume.", None, None)
    return _record("interrupted", INTERRUPTED, "Interrupted.", None, None)


def _record(code: str, exit_code: int, message: str, cause: str | None, fix: str | None) -> dict[str, Any]:
    return {"code": code, "exit": exit_code, "message": message, "cause": cause, "fix": fix}
