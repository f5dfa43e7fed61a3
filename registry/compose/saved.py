"""Save a composition as a folder that contains everything but the base model, and open it again.

    composition.json                         slots with versions and priors, base model, digests of the manifests
    packs/<name>/lorary.json + files         each pack, complete

It opens without the registry that it came from, is verified like a store, and gives the same logits.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from ...adapters.composition import Composition
from ...domains.errors import ConflictError, IntegrityError, NotFoundError
from ...domains.names import check_name
from ..pack.check_manifest import check_manifest
from ..pack.pack_source import PackFolder, read_plain
from ..store.blobs import sha256_of
from ..store.files import make_folder, write_atomic
from ..store.manifest import MANIFEST_FILE, BaseRecord, PackManifest, check_same_base
from ..store.store import Store
from ..store.strict_json import (
    MAX_BYTES,
    JsonObject,
    canonical_json,
    minor_of,
    parse_json,
    record_from_json,
    record_to_json,
)
from .plan import Plan, Slot

SCHEMA = "lorary.composition/1"
COMPOSITION_FILE = "composition.json"


@dataclass(frozen=True, kw_only=True)
class SavedSlot:
    """Entry of one slot in composition.json."""

    name: str
    prior: float
    manifest: str  # digest
    extra: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)
        if not self.prior >= 0:
            raise ValueError(f"prior cannot be {self.prior!r}")


@dataclass(frozen=True, kw_only=True)
class SavedRecord:
    """Content of composition.json."""

    schema: str
    composition: str
    pinned: str
    static: bool
    slots: tuple[SavedSlot, ...]
    base: BaseRecord
    extra: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        expected = [term.name for term in Composition.parse(self.composition).slots]
        found = [slot.name for slot in self.slots]
        if found != expected:
            raise ValueError(f"slots are {', '.join(found) or 'none'}, expected {', '.join(expected)}")
        if not self.static and not all(slot.prior > 0 for slot in self.slots):
            raise ValueError("prior cannot be 0 where the composition routes")


def save_composition(store: Store, plan: Plan, out: Path) -> Path:
    """Write a plan and its packs to a folder; composition.json comes last, so its presence marks a complete folder.

    Raises:
        ConflictError: The folder is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConflictError(
            f"{out} is not empty.",
            cause="a composition is never written over other files",
            fix="choose another folder: --out DIR",
        )
    slots = []
    for slot in plan.slots:
        folder = out / "packs" / slot.name
        for file in slot.manifest.files:
            make_folder((folder / file.path).parent)
            write_atomic(folder / file.path, store.read(slot.manifest, file.path))
        data = slot.manifest.to_json()
        write_atomic(folder / MANIFEST_FILE, data)
        slots.append({"name": slot.name, "prior": slot.prior, "manifest": sha256_of(data)})
    document = {
        "schema": SCHEMA,
        "composition": str(plan.composition),
        "pinned": plan.pinned,
        "static": plan.static,
        "slots": slots,
        "base": record_to_json(plan.slots[0].manifest.base),
    }
    write_atomic(out / COMPOSITION_FILE, canonical_json(document))
    return out


def is_saved_composition(text: str) -> bool:
    """Return whether `text` is the path of a saved composition.

    A bare name is always a domain's; write ./name for a folder.

    Raises:
        NotFoundError: It is a path without a saved composition.
    """
    if "://" in text or not ("/" in text or os.sep in text):
        return False
    if not (Path(text) / COMPOSITION_FILE).is_file():
        raise NotFoundError(
            f"There is no saved composition in {text}.",
            cause=f"it has no {COMPOSITION_FILE}" if Path(text).is_dir() else "there is no such folder",
            fix=f"save one with: registry compose medicine+legal --out {text}; or name domains, see registry list",
        )
    return True


def open_plan(folder: Path, *, base: BaseRecord) -> Plan:
    """Return the plan of a saved composition.

    Raises:
        NotFoundError: The folder has no saved composition.
        IntegrityError: A manifest was changed.
        IncompatibleError: It belongs to another base model, or was written by a newer version of lorary.
    """
    record = _read_record(folder)
    slots = []
    for slot in record.slots:
        manifest = _read_manifest(folder, slot)
        check_manifest(manifest)
        check_same_base(wanted=manifest.base, found=base, what=f"{manifest.name}@{manifest.version}")
        slots.append(Slot(manifest=manifest, prior=slot.prior))
    plan = Plan(composition=Composition.parse(record.composition), slots=tuple(slots), static=record.static)
    if plan.pinned != record.pinned:
        cause = f"{COMPOSITION_FILE} says {record.pinned[:255]!r}, its packs are {plan.pinned!r}"
        raise IntegrityError(f"The saved composition {folder} was changed.", cause=cause)
    return plan


def saved_pack(folder: Path, name: str) -> PackFolder:
    """Return the pack of one slot of a saved composition."""
    return PackFolder(folder / "packs" / name)


def _read_record(folder: Path) -> SavedRecord:
    path = folder / COMPOSITION_FILE
    if not path.exists():
        raise NotFoundError(f"There is no saved composition in {folder}.")
    document = parse_json(read_plain(folder, COMPOSITION_FILE, limit=MAX_BYTES), source=str(path))
    schema = document.get("schema") if isinstance(document, dict) else None
    minor = minor_of(schema, known=SCHEMA, source=str(path))
    return record_from_json(SavedRecord, document, source=str(path), keeps_unknown=minor > 0)


def _read_manifest(folder: Path, slot: SavedSlot) -> PackManifest:
    path = f"packs/{slot.name}/{MANIFEST_FILE}"
    data = read_plain(folder, path, limit=MAX_BYTES)
    if sha256_of(data) != slot.manifest:
        cause = f"expected {slot.manifest}, found {sha256_of(data)}"
        raise IntegrityError(f"The manifest of {slot.name} in {folder} was changed.", cause=cause)
    manifest = PackManifest.from_json(data, source=str(folder / path))
    if manifest.name != slot.name:
        raise IntegrityError(
            f"{folder / path} is the manifest of another pack.", cause=f"its name is {manifest.name!r}"
        )
    return manifest
