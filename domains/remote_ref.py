"""References to packs on the Hub: `hf://owner/repo` or `hf://owner/repo@revision`.

A revision is a branch, a tag such as v2, a pull request such as refs/pr/3, or a commit; the default is the branch main.
For every reference:

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
    """Repository on the Hub, with an optional revision.

    Raises:
        InputError: Repository or revision break the grammar of the Hub.
    """

    repo: str
    revision: str | None = None

    def __post_init__(self) -> None:
        parts = self.repo.split("/")
        if len(parts) != 2 or not all(map(_PART.fullmatch, parts)):
            cause = "Expected owner/repo, of letters, digits, '.', '-' and '_'."
            raise InputError(f"{self.repo!r} is not a valid Hub repository.", cause=cause, fix=_FIX)
        if self.revision is not None and not _REVISION.fullmatch(self.revision):
            cause = "Expected a branch, a tag, refs/pr/N or a commit."
            raise InputError(f"{self.revision!r} is not a valid revision.", cause=cause, fix=_FIX)

    @classmethod
    def parse(cls, text: str) -> "RemoteRef":
        """Parse `[hf://]owner/repo[@revision]`.

        Raises:
            InputError: The text breaks the grammar.
        """
        repo, at, revision = text.removeprefix(REMOTE_PREFIX).partition("@")
        return cls(repo, revision if at else None)

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a full commit id, which never moves."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    @property
    def version(self) -> int | None:
        """Pack version of a tag such as v3, or None for other revisions."""
        match = re.fullmatch("v([1-9][0-9]{0,8})", self.revision or "")
        return int(match[1]) if match else None

    def __str__(self) -> str:
        return f"{REMOTE_PREFIX}{self.repo}" + ("" if self.revision is None else f"@{self.revision}")
