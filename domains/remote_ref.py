"""RemoteRef: a pack on the Hub as people write it, `hf://owner/repo` or `hf://owner/repo@revision`.

A revision is a branch, a tag such as v2, a pull request such as refs/pr/3, or a commit; none means the branch main.
Round trip, for every reference:

    RemoteRef.parse(str(ref)) == ref
"""

import re
from dataclasses import dataclass
from typing import Final

from .errors import InputError

REMOTE_PREFIX: Final = "hf://"

_PART = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"(?!.*(?:\.\.|//|\.lock))[A-Za-z0-9_](?:[A-Za-z0-9._/-]{0,198}[A-Za-z0-9_-])?")
_COMMIT = re.compile("[0-9a-f]{40}")
_FIX: Final = "Write for example: hf://owner/lorary-legal@v2"


@dataclass(frozen=True)
class RemoteRef:
    """A repository of the Hub, and a revision of it.

    Raises:
        InputError: Repository or revision break the Hub's grammar.
    """

    repo: str
    revision: str | None = None

    def __post_init__(self) -> None:
        parts = self.repo.split("/")
        if len(parts) != 2 or not all(map(_PART.fullmatch, parts)):
            cause = "Expected owner/repo, of letters, digits, '.', '-' and '_'."
            raise InputError(f"{self.repo!r} cannot be a repository of the Hub.", cause=cause, fix=_FIX)
        if self.revision is not None and not _REVISION.fullmatch(self.revision):
            cause = "Expected a branch, a tag, refs/pr/N or a commit."
            raise InputError(f"{self.revision!r} cannot be a revision.", cause=cause, fix=_FIX)

    @classmethod
    def parse(cls, text: str) -> "RemoteRef":
        """Read the written form; the prefix may be missing.

        Raises:
            InputError: It breaks the grammar.
        """
        repo, at, revision = text.removeprefix(REMOTE_PREFIX).partition("@")
        return cls(repo, revision if at else None)

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a whole commit id, which means the same for ever."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def number(self) -> int | None:
        """The version that a tag such as v3 stands for."""
        match = re.fullmatch("v([1-9][0-9]{0,8})", self.revision or "")
        return int(match[1]) if match else None

    def __str__(self) -> str:
        return f"{REMOTE_PREFIX}{self.repo}" + ("" if self.revision is None else f"@{self.revision}")
