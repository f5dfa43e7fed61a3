"""Compositions that name packs on the Hub: each hf:// term is pulled and becomes a domain and version of the store.

A commit, once pulled, needs no network. A tag or a branch is asked for each time, because it may have moved; when the
Hub cannot be asked, nothing older is taken in its place unless the user says so, by name or by being offline.
"""

from dataclasses import dataclass, replace

from ...adapters.composition import Composition, Term
from ...domains.errors import RemoteError
from ...domains.progress import OnProgress
from ...domains.remote_ref import REMOTE_PREFIX, RemoteRef
from ..store.manifest import BaseRecord, PackManifest
from ..store.store import Store
from .client import Hub
from .origins import Traced, traced_to
from .pull import PullResult, pull


@dataclass(frozen=True)
class ResolvedComposition:
    """A composition in the names of the store."""

    composition: str
    pulled: tuple[PullResult, ...] = ()
    from_store: tuple[Traced, ...] = ()  # taken from the store without asking the Hub


def has_remote_terms(composition: str) -> bool:
    """Whether a composition names a pack on the Hub."""
    return REMOTE_PREFIX in composition


def resolve_composition(
    store: Store, base: BaseRecord, composition: str, *, on_progress: OnProgress
) -> ResolvedComposition:
    """Pull what a composition names on the Hub, and write it in the names of the store.

    Raises:
        InputError: The composition breaks the grammar, or two terms become the same domain.
        LoraryError: What `pull` raises.
    """
    hub = Hub(on_progress=on_progress)
    terms: list[Term] = []
    pulled: list[PullResult] = []
    from_store: list[Traced] = []
    for term in Composition.parse(composition).terms:
        ref = term.remote
        if ref is None:
            terms.append(term)
            continue
        traces = traced_to(store, endpoint=hub.endpoint, repo=ref.repo)
        if here := _found_here(traces, ref, hub):
            from_store.append(here)
            terms.append(_as_term(here.manifest, term))
            continue
        try:
            found = pull(store, base, ref, hub=hub, on_progress=on_progress)
        except RemoteError as error:
            _offer_what_is_here(error, traces)
            raise
        pulled.append(found)
        terms.append(_as_term(found.manifest, term))
    return ResolvedComposition(str(Composition(tuple(terms))), tuple(pulled), tuple(from_store))


def _found_here(traces: list[Traced], ref: RemoteRef, hub: Hub) -> Traced | None:
    """The stored version that a reference means without a doubt; offline, the newest that a branch may mean."""
    if ref.is_commit:
        return next((traced for traced in traces if traced.origin.commit == ref.revision), None)
    if not hub.offline:
        return None
    if ref.version is not None:
        return next((traced for traced in traces if traced.origin.version == ref.version), None)
    return traces[-1] if traces and ref.revision in (None, "main") else None


def _as_term(manifest: PackManifest, term: Term) -> Term:
    return replace(term, name=manifest.name, selector=str(manifest.version))


def _offer_what_is_here(error: RemoteError, traces: list[Traced]) -> None:
    if traces:
        newest = traces[-1]
        name = f"{newest.manifest.name}@{newest.manifest.version}"
        error.fix = f"{error.fix}; or use what was pulled on {newest.origin.time[:10]}: {name}"
