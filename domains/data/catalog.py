"""The catalog of domain specs: the built-in ones, and those of a folder.

A catalog folder has one folder per domain, with `NAME/domain.toml` and the files that it names. The built-in catalog is
domains/builtin/; specs of another folder take precedence over built-in ones of the same name.
"""

import difflib
from pathlib import Path

from ..errors import NotFoundError
from .example import Example
from .spec import DomainSpec

BUILTIN = Path(__file__).resolve().parents[1] / "builtin"  # domain specs and corpora, and the pocket base
REQUESTS = BUILTIN / "general" / "requests.txt"
ORDINARY_TEXT = (REQUESTS, BUILTIN / "general" / "corpus.jsonl")  # where common words are counted


def builtin_domains() -> dict[str, DomainSpec]:
    """Return the built-in domain specs by name, sorted."""
    return domains_in(BUILTIN)


def everyday_questions() -> list[str]:
    """Return questions that belong to no domain, as users ask them; new domains are probed with them.

    No KP bank is trained on them, and none has them in its statistics: they would prove nothing then.
    """
    return (BUILTIN / "general" / "everyday.txt").read_text(encoding="utf-8").splitlines()


def everyday_requests() -> list[Example]:
    """Return other such questions and requests, for the statistics of general text, which has few."""
    return [Example(completion=line) for line in REQUESTS.read_text(encoding="utf-8").splitlines()]


def domains_in(folder: Path) -> dict[str, DomainSpec]:
    """Return the domain specs of a catalog folder by name, sorted; folders without a `domain.toml` are skipped.

    Raises:
        NotFoundError: There is no such folder.
        InputError: A spec cannot be read.
    """
    if not folder.is_dir():
        raise NotFoundError(f"There is no folder {folder} with domain specs.")
    specs = [DomainSpec.load(path) for path in sorted(folder.glob("*/domain.toml"))]
    return {spec.name: spec for spec in sorted(specs, key=lambda spec: spec.name)}


def find_domain(name: str, folder: Path | None = None) -> DomainSpec:
    """Return the spec of a domain from `folder`, or else from the built-in catalog.

    Raises:
        NotFoundError: There is no such spec; the error lists the known names and suggests the closest.
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
