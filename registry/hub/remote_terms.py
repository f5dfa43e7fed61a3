"""Resolve hf:// terms of a composition: pull each pack and replace the term by a domain and version of the store.

A commit that was pulled before needs no network. A tag or branch is resolved on the Hub each time, because it may have
moved; if the Hub cannot be reached, a stored version takes its place only if the user names it or is offline.
"""

from dataclasses import dataclass, replace

from ...adapters.composition import Composition, Term
from ...domains.errors import RemoteError
from ...domains.progress import OnProgress
from ...domains.remote_ref import REMOTE_PREFIX, RemoteRef
from ..store.manifest import BaseRecord, PackManifest
from ..store.store import Store
from .client import Hub
from .origins import StoredVersion, versions_of_repo
from .pull import PullResult, pull


@dataclass(frozen=True)
class ResolvedComposition:
    """Composition with every hf:// term replaced by a stored version."""

    composition: str
    pulled: tuple[PullResult, ...] = ()
    from_store: tuple[StoredVersion, ...] = ()  # used without contacting the Hub


def has_remote_terms(composition: str) -> bool:
    """Return whether a composition has hf:// terms."""
    return REMOTE_PREFIX in composition


def resolve_composition(
    store: Store, base: BaseRecord, composition: str, *, on_progress: OnProgress
) -> ResolvedComposition:
    """Pull the packs of a composition's hf:// terms, and replace the terms by stored versions.

    Raises:
        InputError: The composition cannot be parsed, or two terms resolve to the same domain.
        LoraryError: See `pull`.
    """
    hub = Hub(on_progress=on_progress)
    terms: list[Term] = []
    pulled: list[PullResult] = []
    from_store: list[StoredVersion] = []
    for term in Composition.parse(composition).terms:
        ref = term.remote
        if ref is None:
            terms.append(term)
            continue
        known = versions_of_repo(store, endpoint=hub.endpoint, repo=ref.repo)
        if stored := _find_stored(known, ref, hub):
            from_store.append(stored)
            terms.append(_local_term(stored.manifest, term))
            continue
        try:
            result = pull(store, base, ref, hub=hub, on_progress=on_progress)
        except RemoteError as error:
            _suggest_stored(error, known)
            raise
        pulled.append(result)
        terms.append(_local_term(result.manifest, term))
    return ResolvedComposition(str(Composition(tuple(terms))), tuple(pulled), tuple(from_store))


def _find_stored(known: list[StoredVersion], ref: RemoteRef, hub: Hub) -> StoredVersion | None:
    """Return the stored version of a commit; offline, also that of a tag, and the newest for the branch main."""
    if ref.is_commit:
        return next((stored for stored in known if stored.origin.commit == ref.revision), None)
    if not hub.offline:
        return None
    if ref.version is not None:
        return next((stored for stored in known if stored.origin.version == ref.version), None)
    return known[-1] if known and ref.revision in (None, "main") else None


def _local_term(manifest: PackManifest, term: Term) -> Term:
    return replace(term, name=manifest.name, selector=str(manifest.version))


def _suggest_stored(error: RemoteError, known: list[StoredVersion]) -> None:
    if known:
        newest = known[-1]
        name = f"{newest.manifest.name}@{newest.manifest.version}"
        error.fix = f"{error.fix}; or use the version pulled on {newest.origin.time[:10]}: {name}"
