"""Errors that a user can cause and fix, each kind with an exit code.

    LoraryError                1   any other expected error
      InputError               2   an invalid argument or invalid data
        CorpusError            2   a row of a data file, named by file and line
      NotFoundError            3   no such store, domain, version or file
      ConflictError            4   it exists already, or another process was faster
      IntegrityError           5   bytes differ from their digest, or a frozen tensor changed
      IncompatibleError        6   another base model, a missing device or a newer schema
      RemoteError              7   the Hub or the network failed
      StorageFullError         8   no space left
      GateFailedError          9   a threshold, acceptance check or chat probe is not met

An error has a `message` (what happened), a `cause` (both values that differ) and a `fix` (a command that helps).
"""

from pathlib import Path

MAX_CHARACTERS = 2000  # of a message or cause; they quote files, which may be hostile and large


class LoraryError(Exception):
    """Base class of errors that a user can cause and fix."""

    exit_code = 1

    def __init__(self, message: str, *, cause: str | None = None, fix: str | None = None):
        super().__init__(_cut(message))
        self.message = _cut(message)
        self.cause = None if cause is None else _cut(cause)
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.message]
        if self.cause:
            lines.append(f"Cause: {self.cause}")
        if self.fix:
            lines.append(f"Fix: {self.fix}")
        return "\n".join(lines)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + "..."


class InputError(LoraryError):
    """Invalid argument or invalid data."""

    exit_code = 2


class CorpusError(InputError):
    """Unusable data file or row, named by file and, if there is one, line."""

    def __init__(
        self,
        source: str | Path,
        problem: str,
        *,
        line: int | None = None,
        cause: str | None = None,
        fix: str | None = None,
    ):
        self.source = str(source)
        self.line = line
        self.problem = problem
        where = self.source if line is None else f"{self.source}:{line}"
        super().__init__(f"{where}: {problem}", cause=cause, fix=fix)


class NotFoundError(LoraryError):
    """Missing store, domain, version or file."""

    exit_code = 3


class ConflictError(LoraryError):
    """Name that exists already, or change that another process made first."""

    exit_code = 4


class IntegrityError(LoraryError):
    """Bytes that differ from their digest, or a frozen tensor that changed."""

    exit_code = 5


class IncompatibleError(LoraryError):
    """Another base model, a missing device or a newer schema."""

    exit_code = 6


class RemoteError(LoraryError):
    """Failure of the Hub or the network."""

    exit_code = 7


class StorageFullError(LoraryError):
    """No space left on the device."""

    exit_code = 8


class GateFailedError(LoraryError):
    """Threshold of a report, acceptance check of a retrained version, or strict chat probe, that is not met."""

    exit_code = 9
