"""`registry pull`: a pack from the Hugging Face Hub; and the packs that a composition names there."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...adapters.composition import GENERAL
from ..options import Json, StorePath
from ..show import facts, output
from ..show.numbers import brief, plural, size
from ..show.page import Cell, Page, Span, cell, faint, fields, line, title
from ..show.progress import show_progress
from ..startup import open_registry

if TYPE_CHECKING:
    from ...registry import Registry
    from ...registry.hub.pull import PullResult


def pull(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="OWNER/REPO or OWNER/REPO@REVISION, also with hf:// in front.", show_default=False
        ),
    ],
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="A tag such as v2, a branch or a commit.", show_default="main")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", help="Name of the domain in this registry.", show_default="the pack's"),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", metavar="", help="Use only the Hub cache on this machine.")
    ] = False,
    signer: Annotated[
        Path | None,
        typer.Option(
            "--require-signature", metavar="KEY", help="Accept only a pack whose signature this public key verifies."
        ),
    ] = None,
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Pull a pack from the Hub: every file is verified, and one version is stored, or nothing.

    Pulling the same version again changes nothing. Repeat an interrupted command to resume it.

    Example: registry pull acme/lorary-legal@v2
    """
    registry = open_registry(store)
    with show_progress(f"pulling {source}", as_json=as_json) as progress:
        done = registry.pull(
            source,
            revision=revision,
            name=name,
            offline=offline,
            signer=signer,
            on_progress=progress.on_progress,
        )
    output.show(pull_page(done), command="pull", as_json=as_json)


def pull_page(done: "PullResult") -> Page:
    """Make the page about a pull."""
    manifest, origin = done.manifest, done.origin
    here = facts.reference(manifest)
    state = "was pulled" if done.is_new else "was pulled before" if not done.fetched else "was repaired"
    total, fetched = sum(file.size for file in manifest.files), sum(file.size for file in done.fetched)
    files = f"{plural(len(done.fetched), 'file')} of {len(manifest.files)} fetched, {size(fetched)} of {size(total)}"
    rows = [
        ("version", cell(f"{here}, {state}")),
        ("from", cell(line(str(origin), faint(f" at {origin.endpoint}")), str(origin))),
        ("commit", cell(origin.commit)),
        ("files", cell(files)),
        ("verified", cell(line(Span(f"{plural(len(manifest.files), 'file')} against the manifest", "good")))),
        ("signature", cell(Span("valid", "good"))) if done.is_signed else None,
        ("base", facts.base(manifest)),
        ("KP bank", _preservation(done)),
        ("latest", cell("yes" if done.is_latest else "no, unchanged")),
        ("digest", cell(manifest.digest)),
    ]
    data = {
        "name": manifest.name,
        "version": manifest.version,
        "digest": manifest.digest,
        "is_new": done.is_new,
        "is_latest": done.is_latest,
        "is_checked": done.is_checked,
        "is_signed": done.is_signed,
        "preservation": done.preservation,
        "fetched": [{"path": file.path, "size": file.size} for file in done.fetched],
        "origin": {key: value for key, value in asdict(origin).items() if key != "extra"},
    }
    return Page(data=data, blocks=(title(f"{here} {state}"), fields(rows)), hints=tuple(_hints(done)))


def _preservation(done: "PullResult") -> Cell:
    """Show whether this registry has the KP bank that the pack was trained over."""
    shown = {
        "same": Span("the one that the pack was trained over", "good"),
        "other": Span("not the one that the pack was trained over", "warn"),
        "unknown": Span("-"),
    }
    return cell(line(shown[done.preservation]), done.preservation)


def _hints(done: "PullResult") -> list[str]:
    manifest = done.manifest
    hints = [f"Use it: registry compose {facts.reference(manifest)}"]
    if done.preservation == "other":
        owner = done.origin.repo.partition("/")[0]
        digest = brief(manifest.lineage["preservation"]["digest"])
        hints.append(f"It was trained over the KP bank {digest}; try registry pull {owner}/lorary-{GENERAL}")
    if manifest.name == GENERAL and not done.is_latest:
        hints.append(f"Your KP bank stays the default; to use this one, name it: {facts.reference(manifest)}+DOMAIN")
    if not done.is_checked:
        hints.append("The Hub was not asked: there may be a newer version.")
    return hints


def pull_named_packs(registry: "Registry", spec: str, *, as_json: bool) -> str:
    """Pull the packs that a composition names on the Hub; return the composition with their local names."""
    with show_progress("asking the Hub", as_json=as_json) as progress:
        found = registry.resolve_composition(spec, on_progress=progress.on_progress)
    if not as_json:
        for pulled in found.pulled:
            state = "pulled" if pulled.is_new else "pulled before"
            output.hint(f"{pulled.origin} is {facts.reference(pulled.manifest)}, {state}")
        for traced in found.from_store:
            output.hint(f"{traced.origin} is {facts.reference(traced.manifest)}; the Hub was not asked")
    return found.composition
