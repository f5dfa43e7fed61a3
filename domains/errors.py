"""What can go wrong, as a person sees it: one tree of errors, one exit code for each kind.

    LoraryError                1   anything else that we foresaw
      InputError               2   the user's words or data are off
        CorpusError            2   a row of a data file, named by file and line
      NotFoundError            3   no such store, domain, version, file
      ConflictError            4   exists already, or somebody else was faster
      IntegrityError           5   bytes differ from their digest; a frozen tensor changed
      IncompatibleError        6   another base model, a missing device, a newer schema
      RemoteError              7   the Hub or the network
      StorageFullError         8   no space left
      GateFailedError          9   a quality gate did not hold

Every error says what happened (`message`), why with the values that differ (`cause`), and a command that helps (`fix`).
"""

from pathlib import Path

MAX_CHARACTERS = 2000  # of a message or cause: what a hostile file holds is quoted, and may be megabytes


class LoraryError(Exception):
    """Base of all errors that a user can cause and fix."""

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
    """The user's words or data are off."""

    exit_code = 2


class CorpusError(InputError):
    """A data file cannot be used; names the file and, where there is one, the line."""

    def __init__(self, source: str | Path, problem: str, *, line: int | None = None, fix: str | None = None):
        self.source = str(source)
        self.line = line
        self.problem = problem
        where = self.source if line is None else f"{self.source}:{line}"
        super().__init__(f"{where}: {problem}", fix=fix)


class NotFoundError(LoraryError):
    """There is no such store, domain, version or file."""

    exit_code = 3


class ConflictError(LoraryError):
    """It exists already, or somebody else was faster."""

    exit_code = 4


class IntegrityError(LoraryError):
    """Bytes differ from their digest, or a frozen tensor changed."""

    exit_code = 5


class IncompatibleError(LoraryError):
    """Another base model, a device that is not there, or a newer schema."""

    exit_code = 6


class RemoteError(LoraryError):
    """The Hub or the network failed."""

    exit_code = 7


class StorageFullError(LoraryError):
    """No space left on the device."""

    exit_code = 8


class GateFailedError(LoraryError):
    """A quality gate did not hold."""

    exit_code = 9
