"""Root of a store: one digest over every manifest, alias and tombstone, so that a version records what was beside it.

    root = sha256 over the store's id and one line `path sha256` for each file, sorted by path

A manifest keeps the roots of before and after its training, and later roots cover that manifest: the versions of a
store are a hash chain. A root has the same size whatever a store holds. The id never leaves the
store: without it, no guess at what else is stored can be tested against a published root.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from .blobs import sha256_of
from .store import Store
from .versions import DomainFolder

_MANIFEST: Final = re.compile(r"domains/([^/]+)/([0-9]+)\.json")


@dataclass(frozen=True)
class StoreState:
    """Digest of each manifest, alias and tombstone at one moment, by its path in the store."""

    id: str  # of the store
    files: dict[str, str]

    @property
    def root(self) -> str:
        """The root of the store."""
        total = hashlib.sha256(f"{self.id}\n".encode())
        for path, digest in sorted(self.files.items()):
            total.update(f"{path} {digest}\n".encode())
        return f"sha256:{total.hexdigest()}"

    @property
    def versions(self) -> dict[str, str]:
        """Digest of each manifest by `name@version`, of removed versions as well."""
        matches = ((_MANIFEST.fullmatch(path), digest) for path, digest in self.files.items())
        return {f"{match[1]}@{match[2]}": digest for match, digest in matches if match}


def read_state(store: Store) -> StoreState:
    """Read every manifest, alias and tombstone once; what another process deletes meanwhile is left out."""
    return StoreState(store.record.id, dict(_digests(store)))


def _digests(store: Store) -> Iterator[tuple[str, str]]:
    for name in store.domains(removed=True):
        for path in DomainFolder(store.path, name).files():
            with suppress(FileNotFoundError):
                yield path.relative_to(store.path).as_posix(), sha256_of(path.read_bytes())
