"""What to say when something is not there: what there is instead, and what was probably meant."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from ...domains.data.catalog import builtin_domains
from ...domains.errors import NotFoundError

_LISTED: Final = 20


def no_such_store(path: Path) -> NotFoundError:
    """The error for a folder that is no store."""
    return NotFoundError(f"There is no store in {path}.", fix=f"Make one: registry init --store {path}")


def no_such_domain(name: str, *, known: list[str]) -> NotFoundError:
    """The error for a domain that has no version."""
    data = "" if name in builtin_domains() else " --data FILE"
    return NotFoundError(
        f"There is no domain named {name!r}.",
        cause=f"Known domains: {_listed(known)}.",
        fix=_did_you_mean(name, known) or f"Add it: registry add-domain {name}{data}",
    )


def removed_version(name: str, version: int) -> NotFoundError:
    """The error for a version that was removed."""
    return NotFoundError(
        f"{name}@{version} was removed.",
        cause="Its files are kept until gc deletes them, its number is never used again.",
        fix=f"Bring it back: registry restore {name}@{version}",
    )


def collected_version(name: str, version: int) -> NotFoundError:
    """The error for a removed version whose files gc has deleted."""
    return NotFoundError(
        f"{name}@{version} cannot be brought back.",
        cause="It was removed, and gc has deleted its files since.",
        fix=f"See what there is: registry log {name}",
    )


def no_such_version(name: str, wanted: str | int, *, versions: list[int], aliases: Mapping[str, int]) -> NotFoundError:
    """The error for a version or alias that a known domain does not have."""
    described = [f"{alias} = {version}" for alias, version in aliases.items()]
    return NotFoundError(
        f"There is no {name}@{wanted}.",
        cause=f"Known versions: {_listed(map(str, versions))}. Aliases: {_listed(described)}.",
        fix=_did_you_mean(str(wanted), list(aliases)) or f"See what there is: registry show {name}",
    )


def _listed(items: Iterable[str]) -> str:
    items = list(items)
    shown = items[:_LISTED]
    rest = len(items) - len(shown)
    return (", ".join(shown) or "none") + (f" and {rest} more" if rest else "")


def _did_you_mean(name: str, known: list[str]) -> str | None:
    matches = get_close_matches(name, known)
    return f"Did you mean {' or '.join(matches)}?" if matches else None
