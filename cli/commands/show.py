"""`registry list`, `show` and `version`: what is there. Nothing is computed here and nothing heavy is loaded."""

import json
import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import TYPE_CHECKING, Annotated

import typer

from ...adapters.composition import GENERAL
from ..options import Json, Reference, StorePath
from ..show import facts as of
from ..show import output
from ..show.numbers import brief, exact, percent, short, size
from ..show.page import Cell, Page, Part, cell, facts, table, title
from ..startup import open_registry

if TYPE_CHECKING:
    from ...registry import Registry
    from ...registry.store.manifest import PackManifest


def list_domains(store: StorePath = None, as_json: Json = False) -> None:
    """List the domains of a registry with their scores.

    BITS/BYTE is that of held-out text under routing, lower is better; GAIN is by how much it is below the base model's.

    Example: registry list
    """
    registry = open_registry(store)
    output.show(list_page(registry), command="list", as_json=as_json)


def list_page(registry: "Registry") -> Page:
    """The latest version of every domain."""
    manifests = registry.list()
    columns = ("NAME", "VERSION", "ROLE", "EXPERTS", "PARAMETERS", "BITS/BYTE", "GAIN", "CREATED")
    rows = table(
        columns,
        [_row(manifest) for manifest in manifests],
        right=("VERSION", "EXPERTS", "PARAMETERS", "BITS/BYTE", "GAIN"),
        tight=("NAME", "VERSION", "ROLE", "EXPERTS", "PARAMETERS", "BITS/BYTE", "GAIN", "CREATED"),
    )
    hint = {
        0: "There is no KP bank yet: repeat registry init, it resumes",
        1: "Add a domain: registry add-domain medicine",
    }
    return Page(
        data={"store": str(registry.store.path), "domains": [_summary(manifest) for manifest in manifests]},
        blocks=(rows,),
        hints=(hint[len(manifests)],) if len(manifests) in hint else (),
    )


def _row(manifest: "PackManifest") -> list[Cell]:
    routed, gain = manifest.evaluation.get("routed"), of.gain(manifest)
    total = of.parameters(manifest)
    return [
        cell(manifest.name),
        cell(str(manifest.version)),
        cell("KP bank" if manifest.name == GENERAL else manifest.role, manifest.role),
        cell(str(of.expert_count(manifest))),
        cell(short(total), total),
        of.number(routed),
        cell(percent(gain, digits=1), exact(gain)),
        of.day(manifest.created),
    ]


def _summary(manifest: "PackManifest") -> dict[str, object]:
    return {
        "name": manifest.name,
        "version": manifest.version,
        "role": manifest.role,
        "description": manifest.description,
        "experts": of.expert_count(manifest),
        "parameters": of.parameters(manifest),
        "bits_per_byte": manifest.evaluation.get("routed"),
        "gain": of.gain(manifest),
        "created": manifest.created,
        "digest": manifest.digest,
    }


def show(
    ref: Reference,
    files: Annotated[bool, typer.Option("--files", metavar="", help="List the files of the pack instead.")] = False,
    manifest: Annotated[
        bool, typer.Option("--manifest", metavar="", help="Print the manifest itself instead.")
    ] = False,
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Show everything about one version of a domain: experts, training, scores, lineage and proof.

    Example: registry show medicine
    """
    registry = open_registry(store)
    found = registry.show(ref)
    if manifest and not as_json:
        output.raw(found.to_json().decode().rstrip("\n"))
        return
    output.show(files_page(found) if files else show_page(registry, found), command="show", as_json=as_json)


def show_page(registry: "Registry", manifest: "PackManifest") -> Page:
    """A version as a person wants to know it."""
    versions = registry.store.versions(manifest.name)
    aliases = [alias for alias, number in registry.store.aliases(manifest.name).items() if number == manifest.version]
    rows: list[tuple[str, Cell | Part | None]] = [
        ("description", manifest.description),
        ("version", cell(of.reference(manifest) + (f", {', '.join(aliases)}" if aliases else ""))),
        ("all versions", ", ".join(map(str, versions))),
        ("role", manifest.role),
        ("license", manifest.license),
        ("base", of.base(manifest)),
        ("experts", of.experts(manifest)),
        ("per layer", of.per_layer(manifest.allocation["counts"])),
        ("targets", ", ".join(sorted({target for expert in manifest.experts for target in expert.targets}))),
        ("schedule", manifest.allocation["schedule"]),
        ("data", of.data(manifest) or "-"),
        ("training", of.training(manifest)),
        ("loss", of.loss(manifest)),
        ("routing drift", of.drift(manifest)),
        ("frozen", of.proof(manifest)),
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
    return Page(data=data, blocks=(title(manifest.name), facts(rows), of.scores(manifest)))


def files_page(manifest: "PackManifest") -> Page:
    """The files of a pack."""
    files = manifest.files
    rows = [
        [cell(file.path), cell(file.kind), cell(size(file.size), file.size), cell(brief(file.sha256), file.sha256)]
        for file in files
    ]
    listed = [{"path": f.path, "kind": f.kind, "size": f.size, "sha256": f.sha256} for f in files]
    block = table(("PATH", "KIND", "SIZE", "DIGEST"), rows, right=("SIZE",), tight=("SIZE", "DIGEST"))
    return Page(data={"name": manifest.name, "version": manifest.version, "files": listed}, blocks=(block,))


def _lineage(manifest: "PackManifest") -> str:
    parent, preservation = manifest.parent, manifest.lineage.get("preservation")
    mode = manifest.lineage.get("mode")
    first = "begun anew" if parent is None else f"{mode}, from {manifest.name}@{parent}"
    if not preservation:
        return first
    return f"{first}, over {GENERAL}@{preservation['version']} {brief(preservation['digest'])}"


def version(as_json: Json = False) -> None:
    """Print the versions of this program and of what it stands on.

    Example: registry version
    """
    names = ("lorary", "torch", "transformers", "safetensors", "faiss-cpu", "huggingface-hub", "typer")
    found = {name: _installed(name) for name in names} | {"python": platform.python_version()}
    page = Page(data={"versions": found}, blocks=(facts((name, cell(number)) for name, number in found.items()),))
    output.show(page, command="version", as_json=as_json)


def _installed(name: str) -> str:
    try:
        return installed(name)
    except PackageNotFoundError:
        return "not installed"
