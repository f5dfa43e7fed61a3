"""What an export contains, known before torch is loaded; and the export of a pack as a tar archive."""

import io
import shlex
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ...adapters.composition import Composition
from ...domains.errors import IncompatibleError
from ..compose.plan import Plan
from ..compose.saved import is_saved_composition
from ..store.files import new_path
from ..store.manifest import MANIFEST_FILE, PackManifest
from ..store.store import Store

FORMATS: Final = ("peft", "vllm", "merged", "tar")
NOT_ROUTED: Final = {  # why a format has constant gates
    "peft": "a PEFT adapter has constant gates",
    "vllm": "vLLM serves one fixed adapter per request, and computes no gates",
    "merged": "a merged weight is the same for every token",
}


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """Result of an export."""

    out: Path
    pinned: str  # the composition with explicit versions
    command: str  # how to use the result
    facts: dict[str, str | int | float] = field(default_factory=dict)


def plan_export(plan_of: Callable[..., Plan], composition: str, *, static: bool, to: str) -> Plan:
    """Return the plan of what is exported; a single version without a weight is exported as a static composition.

    Args:
        plan_of: `plan_of(composition, static=...)` returns the plan of a composition.

    Raises:
        IncompatibleError: The composition is routed.
    """
    plan = plan_of(composition, static=static or _is_single(composition))
    check_static(plan, to=to)
    return plan


def _is_single(composition: str) -> bool:
    if is_saved_composition(composition):
        return False
    terms = Composition.parse(composition).terms
    return len(terms) == 1 and terms[0].weight is None


def check_static(plan: Plan, *, to: str) -> None:
    """Raise if the gates of a composition depend on the text.

    Raises:
        IncompatibleError: The composition is routed.
    """
    if not plan.static:
        raise IncompatibleError(
            f"{plan.composition} is routed, and no export can be.",
            cause=NOT_ROUTED[to],
            fix=f"export it with constant weights: registry export {plan.composition} --static --to {to} --out DIR",
        )


def export_archive(store: Store, manifest: PackManifest, out: Path) -> ExportResult:
    """Export the pack of a version as a reproducible tar archive.

    Raises:
        IntegrityError: A file of the pack is damaged.
        ConflictError: `out` exists.
    """
    files = {MANIFEST_FILE: manifest.to_json()} | {f.path: store.read(manifest, f.path) for f in manifest.files}
    with new_path(out) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
        for path, data in sorted(files.items()):
            member = tarfile.TarInfo(f"{manifest.name}/{path}")
            member.size, member.mode = len(data), 0o644  # mtime, uid and gid stay 0, so equal packs give equal bytes
            archive.addfile(member, io.BytesIO(data))
    pinned = f"{manifest.name}@{manifest.version}"
    return ExportResult(
        out=out, pinned=pinned, command=shlex.join(["tar", "xf", str(out)]), facts={"files": len(files)}
    )
