"""Removing a version and bringing it back, by what a person calls it."""

from ...adapters.composition import GENERAL, parse_reference
from ...domains.errors import ConflictError, InputError, NotFoundError
from ...domains.names import parse_selector
from .manifest import PackManifest
from .store import Store


def remove_version(store: Store, reference: str) -> PackManifest:
    """Removes a version and returns its manifest; its files are kept and its number is never used again.

    Raises:
        NotFoundError: There is no such version.
        ConflictError: An alias other than `latest` means it, or it is KP's, over which the domains were trained.
    """
    manifest = store.manifest(*parse_reference(reference))
    check_removable(manifest)
    store.remove(manifest.name, manifest.version)
    return manifest


def check_removable(manifest: PackManifest) -> None:
    """Refuses to remove the KP bank.

    Raises:
        ConflictError: It is KP's.
    """
    if manifest.name == GENERAL:
        raise ConflictError("The KP bank cannot be removed.", cause="every domain of the registry was trained over it")


def restore_version(store: Store, reference: str) -> PackManifest:
    """Brings a removed version back and returns its manifest; a name alone means the one that was removed last.

    Raises:
        NotFoundError: There was never such a version, or none of the domain is removed.
        ConflictError: It is not removed.
    """
    name, selector = parse_reference(reference)
    removed = store.removed(name)
    if selector is None and not removed:
        raise NotFoundError(f"No version of {name!r} is removed.", fix=f"see what there is: registry log {name}")
    version = parse_selector(selector or str(max(removed, key=lambda number: (removed[number], number))))
    if isinstance(version, str):
        raise InputError(f"{reference!r} names an alias.", fix=f"name the version: registry restore {name}@NUMBER")
    store.restore(name, version)
    return store.manifest(name, version)
