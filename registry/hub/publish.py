"""What of a version is published: all but the tokens that its text has once.

A domain's own store keeps all counts, so that they add up and a rare term is learned by retraining again and again. A
name that a text has once stays there (docs/threat-model.md): the published version has another file of statistics, and
so another digest.
"""

from dataclasses import replace

from ...domains.errors import IntegrityError
from ...domains.statistics.statistics import MIN_COUNT
from ..pack.tensor_file import load_tensors, save_tensors
from ..store.blobs import sha256_of
from ..store.manifest import ROUTER_TENSORS, PackManifest
from ..store.store import Store


def published(store: Store, manifest: PackManifest) -> PackManifest:
    """Return the manifest that is published for a stored version, whose files are then in the store's blobs.

    It is the version's own if its text has no rare tokens, or it was published before.

    Raises:
        IntegrityError: The file of statistics is damaged.
    """
    source = f"{manifest.name}@{manifest.version}: {ROUTER_TENSORS}"
    tensors = load_tensors(store.read(manifest, ROUTER_TENSORS), source=source)
    is_changed = False
    for kind in ("token", "pair"):
        ids, counts = f"statistics.{kind}_ids", f"statistics.{kind}_counts"
        if ids not in tensors or counts not in tensors or tensors[ids].shape != tensors[counts].shape:
            raise IntegrityError(f"{source} is incomplete.", cause=f"{ids} and {counts} do not match")
        common = tensors[counts] >= MIN_COUNT
        is_changed |= not common.all().item()
        tensors |= {ids: tensors[ids][common], counts: tensors[counts][common]}
    if not is_changed:
        return manifest
    data = save_tensors(tensors)
    store.blobs.put(data)
    digest = sha256_of(data)
    files = (
        replace(file, size=len(data), sha256=digest) if file.path == ROUTER_TENSORS else file for file in manifest.files
    )
    return replace(manifest, files=tuple(files))
