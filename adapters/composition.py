"""Composition: the domains to combine, with their versions and weights.

    COMPOSITION = TERM ("+" TERM)*        TERM = (NAME ["@" (VERSION | ALIAS)] | REMOTE ["@" REVISION]) [":" WEIGHT]
                                          REMOTE = "hf://" OWNER "/" REPO

    medicine+general        medicine@2:0.7+legal:0.3        legal@production        hf://acme/lorary-legal@v2:0.3+medicine

A remote term names a pack on the Hub. The pack is pulled before the composition is planned, and the term is replaced by
the local domain and version.

`general` is the knowledge-preservation slot. It is always loaded, so a bare `general` next to other domains is omitted
from the canonical form. Order is irrelevant: `general` comes first, the others are sorted by name. Round trip:

    Composition.parse(str(c)) == c
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from ..domains.errors import InputError
from ..domains.names import check_name, parse_selector
from ..domains.remote_ref import REMOTE_PREFIX, RemoteRef

GENERAL: Final = "general"  # the knowledge-preservation slot

# no plus sign in exponents: it separates terms
_WEIGHT = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE]-?[0-9]+)?")
_FIX: Final = "Write for example: medicine@2:0.7+legal:0.3"


@dataclass(frozen=True)
class Term:
    """One domain of a composition; without a selector the alias `latest`, without a weight an equal prior."""

    name: str  # domain, or Hub repository: hf://owner/repo
    selector: str | None = None  # version such as "2" or alias; for a repository, a revision
    weight: float | None = None  # > 0

    def __post_init__(self) -> None:
        _check_name(self.name)
        if self.selector is not None:
            _check_selector(self.name, self.selector)
        if self.weight is not None:
            object.__setattr__(self, "weight", _check_weight(float(self.weight)))

    @property
    def remote(self) -> RemoteRef | None:
        """Pack on the Hub that the term names; None for a domain of the store."""
        if not self.name.startswith(REMOTE_PREFIX):
            return None
        return RemoteRef(self.name.removeprefix(REMOTE_PREFIX), self.selector)

    def __str__(self) -> str:
        selector = "" if self.selector is None else f"@{self.selector}"
        weight = "" if self.weight is None else f":{_write_weight(self.weight)}"
        return f"{self.name}{selector}{weight}"


@dataclass(frozen=True)
class Composition:
    """Terms in canonical order, each domain once.

    Raises:
        InputError: There are no terms, or a domain occurs twice.
    """

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", _canonical(self.terms))

    @classmethod
    def parse(cls, text: str) -> "Composition":
        """Parse a composition.

        Raises:
            InputError: `text` violates the grammar; the error names the text, the position and an example.
        """
        terms: dict[str, Term] = {}
        position = 0
        for part in text.split("+"):
            term = _parse_term(text, part, position)
            with _error_location(text, position):
                if term.name in terms:
                    raise InputError(f"{term.name!r} occurs twice.")
            terms[term.name] = term
            position += len(part) + 1
        return cls(tuple(terms.values()))

    @property
    def slots(self) -> tuple[Term, ...]:
        """Slots to load: the terms, preceded by `general` if it is not among them."""
        if self.terms[0].name == GENERAL:
            return self.terms
        return (Term(GENERAL), *self.terms)

    def __str__(self) -> str:
        return "+".join(str(term) for term in self.terms)


def parse_reference(text: str) -> tuple[str, str | None]:
    """Return the name and selector of a reference: `medicine`, `medicine@2`, `medicine@production`.

    Raises:
        InputError: `text` names several domains, has a weight, or violates the grammar.
    """
    refusal = InputError(f"{text!r} does not name one version.", fix="write NAME, NAME@2 or NAME@ALIAS")
    try:
        terms = Composition.parse(text).terms
    except InputError as error:
        refusal.cause = error.cause
        raise refusal from error
    if len(terms) != 1 or terms[0].weight is not None:
        raise refusal
    return terms[0].name, terms[0].selector


def _canonical(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """Sort terms, `general` first, and drop a bare `general` next to others, which is redundant."""
    names = [term.name for term in terms]
    if not names:
        raise InputError("The composition names no domain.", fix=_FIX)
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"The composition names {name!r} twice.", fix=_FIX)
    if len(terms) > 1:
        terms = tuple(term for term in terms if term != Term(GENERAL))
    return tuple(sorted(terms, key=lambda term: (term.name != GENERAL, term.name)))


def _parse_term(text: str, part: str, position: int) -> Term:
    prefix = REMOTE_PREFIX if part.startswith(REMOTE_PREFIX) else ""
    head, colon, weight = part.removeprefix(prefix).partition(":")
    name, at, selector = head.partition("@")
    head, name = prefix + head, prefix + name
    with _error_location(text, position):
        _check_name(name)
    with _error_location(text, position + len(name) + 1):
        if at:
            _check_selector(name, selector)
    with _error_location(text, position + len(head) + 1):
        number = _parse_weight(weight) if colon else None
    return Term(name, selector if at else None, number)


def _check_name(name: str) -> None:
    if name.startswith(REMOTE_PREFIX):
        RemoteRef.parse(name)
    else:
        check_name(name)


def _check_selector(name: str, selector: str) -> None:
    if name.startswith(REMOTE_PREFIX):
        RemoteRef.parse(f"{name}@{selector}")
    else:
        parse_selector(selector)


def _parse_weight(text: str) -> float:
    if not _WEIGHT.fullmatch(text):
        raise InputError(f"{text!r} is not a weight.", cause="Expected a number such as 0.7.")
    return _check_weight(float(text))


def _check_weight(weight: float) -> float:
    if not (math.isfinite(weight) and weight > 0):
        raise InputError(f"{weight!r} is not a weight.", cause="A weight is a finite number above 0.", fix=_FIX)
    return weight


def _write_weight(weight: float) -> str:
    """Return the shortest text that parses to the same number."""
    return repr(weight).removesuffix(".0").replace("e+", "e")


@contextmanager
def _error_location(text: str, position: int) -> Iterator[None]:
    """Add the whole text and the position, counted from 1, to an error about one part."""
    try:
        yield
    except InputError as error:
        reason = " ".join(filter(None, [error.message, error.cause]))
        cause = f"At character {position + 1}: {reason}"
        raise InputError(f"Cannot read the composition {text!r}.", cause=cause, fix=_FIX) from error
