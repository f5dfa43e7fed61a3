"""Grammar of domain names, aliases, and version selectors.

A name is also a folder name on every operating system, part of a Hub repository name and a word of the composition
grammar, so it is short and lower case, without the characters `@ : + . /`.
"""

import re

from .errors import InputError

NAME_PATTERN = r"[a-z0-9](?:[a-z0-9_-]{0,62}[a-z0-9])?"
VERSION_PATTERN = r"[1-9][0-9]{0,8}"

WINDOWS_NAMES = frozenset(
    {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}
)
RESERVED_NAMES = frozenset({"latest", "base", "all", "none", "router"})

_NOT_FOR_DOMAINS = WINDOWS_NAMES | RESERVED_NAMES
_RULE = "1 to 64 lower-case letters, digits, '-' and '_', beginning and ending with a letter or digit"


def is_name(name: str) -> bool:
    """Return whether `name` is a valid domain name."""
    return _follows_grammar(name) and name not in _NOT_FOR_DOMAINS


def check_name(name: str) -> str:
    """Return `name` unchanged if it is a valid domain name.

    Raises:
        InputError: It breaks the grammar or is reserved.
    """
    fix = "Choose a name such as 'medicine' or 'contract-law'."
    return _check(name, "a domain name", reserved=_NOT_FOR_DOMAINS, fix=fix)


def check_alias(alias: str) -> str:
    """Return `alias` unchanged if it is a valid alias.

    Raises:
        InputError: It breaks the grammar of names, or is a number, which would be read as a version.
    """
    fix = "Choose an alias such as 'latest' or 'production'."
    if re.fullmatch("[0-9]+", alias):
        raise InputError(f"{alias!r} cannot be an alias.", cause="A number is always read as a version.", fix=fix)
    return _check(alias, "an alias", reserved=WINDOWS_NAMES, fix=fix)


def parse_selector(selector: str) -> int | str:
    """Return the version as an int, or the alias as a string.

    Raises:
        InputError: The selector is neither.
    """
    if re.fullmatch(VERSION_PATTERN, selector):
        return int(selector)
    if re.fullmatch("[0-9]+", selector):
        cause = "Versions count from 1, have at most nine digits and no leading zero."
        raise InputError(f"{selector!r} cannot be a version.", cause=cause, fix="Write for example 2 or latest.")
    return check_alias(selector)


def _check(name: str, what: str, *, reserved: frozenset[str], fix: str) -> str:
    if not _follows_grammar(name):
        raise InputError(f"{name!r} cannot be {what}.", cause=f"Expected {_RULE}.", fix=fix)
    if name in reserved:
        raise InputError(f"{name!r} cannot be {what}.", cause="The word is reserved.", fix=fix)
    return name


def _follows_grammar(name: str) -> bool:
    return re.fullmatch(NAME_PATTERN, name) is not None
