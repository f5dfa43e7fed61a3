"""What an export will be, known before torch is loaded; and the one that needs no model: a pack as an archive."""

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

REASONS: Final = {
    "peft": "an adapter of PEFT has constant gates",
    "vllm": "vLLM serves one fixed adapter a request, and computes no gates",
    "merged": "a weight is the same for every token",
}


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was written."""

    out: Path
    pinned: str  # the versions in it
    command: str  # how to use it
    facts: dict[str, str | int | float] = field(default_factory=dict)


def static_plan(plan_of: Callable[..., Plan], composition: str, *, static: bool, to: str) -> Plan:
    """The plan of what is exported; one version without a weight stands for its own static composition.

    Raises:
        IncompatibleError: The composition routes.
    """
    plan = plan_of(composition, static=static or _is_alone(composition))
    check_static(plan, to=to)
    return plan


def _is_alone(composition: str) -> bool:
    if is_saved_composition(composition):
        return False
    terms = Composition.parse(composition).terms
    return len(terms) == 1 and terms[0].weight is None


def check_static(plan: Plan, *, to: str) -> None:
    """Refuses to export gates that depend on the text.

    Raises:
        IncompatibleError: The composition routes.
    """
    if not plan.static:
        raise IncompatibleError(
            f"{plan.composition} routes by its text; what is exported cannot.",
            cause=REASONS[to],
            fix=f"export it with constant weights: registry export {plan.composition} --static --to {to} --out DIR",
        )


def export_archive(store: Store, manifest: PackManifest, out: Path) -> ExportResult:
    """The pack of a version as a tar archive: the same bytes whenever and wherever it is written.

    Raises:
        IntegrityError: A file of the pack is damaged.
        ConflictError: There is something at `out`.
    """
    files = {MANIFEST_FILE: manifest.to_json()} | {f.path: store.read(manifest, f.path) for f in manifest.files}
    with new_path(out) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive:
        for path, data in sorted(files.items()):
            member = tarfile.TarInfo(f"{manifest.name}/{path}")
            member.size, member.mode = len(data), 0o644  # its times and owners are 0 and nobody
            archive.addfile(member, io.BytesIO(data))
    pinned = f"{manifest.name}@{manifest.version}"
    return ExportResult(
        out=out, pinned=pinned, command=shlex.join(["tar", "xf", str(out)]), facts={"files": len(files)}
    )
