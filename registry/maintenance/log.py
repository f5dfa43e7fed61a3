"""The versions of a domain: where each came from, and what became of it."""

from dataclasses import dataclass
from typing import Any

from ...domains.errors import IntegrityError, LoraryError
from ..store.store import OnUnreadable, Store


@dataclass(frozen=True, kw_only=True)
class LogEntry:
    """One version in the log."""

    name: str
    version: int
    aliases: list[str]
    parent: int | None  # the version it was retrained from
    mode: str | None  # how it was retrained
    held_back: bool  # whether its acceptance check failed
    removed: str | None  # when it was removed, ISO 8601
    bits_per_byte: float | None  # of its held-out text, routed
    gate: dict[str, Any] | None  # the acceptance check, as the manifest records it
    created: str  # ISO 8601
    digest: str


def version_log(store: Store, name: str | None = None, *, on_unreadable: OnUnreadable | None = None) -> list[LogEntry]:
    """Return every version of a domain, or of all, newest first; removed versions included.

    Args:
        on_unreadable: Called for each version, or domain, that is left out because a file cannot be read.

    Raises:
        NotFoundError: There is no such domain.
        IntegrityError: A manifest or alias cannot be read, and `on_unreadable` is not given.
    """
    names = [name] if name is not None else store.domains(removed=True)
    entries = [entry for each in names for entry in _versions(store, each, on_unreadable or _refuse)]
    return sorted(entries, key=lambda entry: (entry.created, entry.name, entry.version), reverse=True)


def _refuse(_reference: str, error: LoraryError) -> None:
    raise error


def _versions(store: Store, name: str, on_unreadable: OnUnreadable) -> list[LogEntry]:
    removed = store.removed(name)
    manifests, unreadable = store.readable_history(name)
    for version, error in unreadable.items():
        on_unreadable(f"{name}@{version}", error)
    aliases: dict[str, int] = {}
    try:
        aliases = store.aliases(name)
    except IntegrityError as error:
        on_unreadable(f"aliases of {name}", error)
    return [
        LogEntry(
            name=name,
            version=manifest.version,
            aliases=[alias for alias, version in aliases.items() if version == manifest.version],
            parent=manifest.parent,
            mode=manifest.lineage.get("mode"),
            held_back=manifest.is_held_back,
            removed=removed.get(manifest.version),
            bits_per_byte=manifest.evaluation.get("routed"),
            gate=manifest.evaluation.get("gate"),
            created=manifest.created,
            digest=manifest.digest,
        )
        for manifest in manifests
    ]
