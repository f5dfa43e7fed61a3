"""`registry show`: everything about one version."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ...adapters.composition import GENERAL
from ..options import Json, Reference, StorePath
from ..show import facts, output
from ..show.numbers import brief, size
from ..show.page import Cell, Page, Paragraph, Part, Span, cell, fields, line, table, title
from ..startup import open_registry

if TYPE_CHECKING:
    from ...registry import Registry
    from ...registry.store.manifest import PackManifest


def show(
    ref: Reference,
    files: Annotated[bool, typer.Option("--files", metavar="", help="List the pack's files instead.")] = False,
    manifest: Annotated[bool, typer.Option("--manifest", metavar="", help="Print the manifest instead.")] = False,
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Show one version of a domain: experts, training, scores, lineage and frozen proof.

    Example: registry show medicine
    """
    registry = open_registry(store)
    found = registry.show(ref)
    if manifest and not as_json:
        output.show_document(found.to_json().decode().rstrip("\n"))
        return
    output.show(files_page(found) if files else show_page(registry, found), command="show", as_json=as_json)


def show_page(registry: "Registry", manifest: "PackManifest") -> Page:
    """Make the page of a version."""
    versions = registry.store.versions(manifest.name)
    aliases = [alias for alias, number in registry.store.aliases(manifest.name).items() if number == manifest.version]
    rows: list[tuple[str, Cell | Part | None]] = [
        ("description", manifest.description),
        ("version", cell(facts.reference(manifest) + (f", {', '.join(aliases)}" if aliases else ""))),
        ("all versions", ", ".join(map(str, versions))),
        ("role", manifest.role),
        ("license", manifest.license),
        ("base", facts.base(manifest)),
        ("experts", facts.experts(manifest)),
        ("per layer", facts.per_layer(manifest.allocation["counts"])),
        ("targets", ", ".join(sorted({target for expert in manifest.experts for target in expert.targets}))),
        ("schedule", manifest.allocation["schedule"]),
        ("data", facts.data(manifest) or "-"),
        ("training", facts.training(manifest)),
        ("loss", facts.loss(manifest)),
        ("validation", facts.validation(manifest)),
        ("routing drift", facts.drift(manifest)),
        ("everyday chat", facts.chat(manifest)),
        ("frozen", facts.proof(manifest)),
        ("lineage", _lineage(manifest)),
        ("files", f"{len(manifest.files)}, {size(sum(file.size for file in manifest.files))}"),
        ("created", cell(manifest.created[:16].replace("T", " ") + " UTC", manifest.created)),
        ("made with", manifest.made_with),
        ("digest", manifest.digest),
    ]
    data = {
        "name": manifest.name,
        "version": manifest.version,
        "versions": versions,
        "aliases": aliases,
        "digest": manifest.digest,
        "manifest": json.loads(manifest.to_json()),
    }
    reason = manifest.evaluation.get("share_reason")
    note = f"The share of oracle gain is not measurable: {reason}."
    notes = (Paragraph(line(Span(note, "warn")), in_pipes=False),) if reason else ()
    return Page(data=data, blocks=(title(manifest.name), fields(rows), facts.scores(manifest), *notes))


def files_page(manifest: "PackManifest") -> Page:
    """Make the list of a pack's files."""
    files = manifest.files
    rows = [
        [cell(file.path), cell(file.kind), cell(size(file.size), file.size), cell(brief(file.sha256), file.sha256)]
        for file in files
    ]
    listed = [{"path": f.path, "kind": f.kind, "size": f.size, "sha256": f.sha256} for f in files]
    block = table(("PATH", "KIND", "SIZE", "DIGEST"), rows, right=("SIZE",), no_wrap=("SIZE", "DIGEST"))
    return Page(data={"name": manifest.name, "version": manifest.version, "files": listed}, blocks=(block,))


def _lineage(manifest: "PackManifest") -> str:
    parent, preservation = manifest.parent, manifest.lineage.get("preservation")
    mode = manifest.lineage.get("mode")
    first = "no parent" if parent is None else f"{mode}, from {manifest.name}@{parent}"
    if not preservation:
        return first
    return f"{first}, trained over {GENERAL}@{preservation['version']} {brief(preservation['digest'])}"
