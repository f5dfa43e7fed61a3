"""The catalog: which domains are known without any data of the user's own.

A catalog folder holds one folder per domain, `NAME/domain.toml`, with the files that it names beside it. The built-in
one is domains/builtin/; a team may keep another one, whose specs win over built-in ones of the same name.
"""

import difflib
from pathlib import Path

from ..errors import NotFoundError
from .spec import DomainSpec

BUILTIN = Path(__file__).resolve().parents[1] / "builtin"  # domain specs and corpora, and the pocket base


def builtin_domains() -> dict[str, DomainSpec]:
    """The domains that ship with the program, by name, sorted."""
    return domains_in(BUILTIN)


def domains_in(folder: Path) -> dict[str, DomainSpec]:
    """The domains of a catalog folder, by name, sorted; folders without a `domain.toml` are passed over.

    Raises:
        NotFoundError: There is no such folder.
        InputError: A spec in it cannot be read.
    """
    if not folder.is_dir():
        raise NotFoundError(f"There is no folder {folder} with domain specs.")
    specs = [DomainSpec.load(path) for path in sorted(folder.glob("*/domain.toml"))]
    return {spec.name: spec for spec in sorted(specs, key=lambda spec: spec.name)}


def find_domain(name: str, folder: Path | None = None) -> DomainSpec:
    """The spec of a domain, from the folder if one is given and has it, else from the built-in ones.

    Raises:
        NotFoundError: Neither knows the name; the error lists the known ones and the closest.
    """
    known = builtin_domains() | (domains_in(folder) if folder else {})
    if name in known:
        return known[name]
    closest = difflib.get_close_matches(name.lower(), known, n=1)
    guess = f"did you mean {closest[0]!r}? " if closest else ""
    raise NotFoundError(
        f"There is no domain spec named {name!r}.",
        cause=f"known domains: {', '.join(sorted(known)) or 'none'}",
        fix=f"{guess}Give your own text with --data FILE.",
    )
