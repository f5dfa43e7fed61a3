"""`registry push`, `pull` and `search`: packs to and from the Hugging Face Hub."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...adapters.composition import GENERAL
from ..options import Json, Reference, StorePath
from ..show import facts as of
from ..show import output
from ..show.numbers import brief, exact, percent, plural, size
from ..show.page import Cell, Page, Span, cell, facts, faint, line, table, title
from ..show.watch import watch
from ..startup import open_registry, quiet_libraries

if TYPE_CHECKING:
    from ...registry import Registry
    from ...registry.hub.pull import PullResult
    from ...registry.hub.push import PushResult
    from ...registry.hub.search import SearchResult


def push(
    ref: Reference,
    destination: Annotated[
        str | None,
        typer.Argument(
            metavar="DEST", help="OWNER/REPO on the Hub, or an OWNER.", show_default="lorary-NAME of your own"
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", metavar="", help="A repository that is made is private.")
    ] = False,
    create_pr: Annotated[
        bool,
        typer.Option("--create-pr", metavar="", help="Open a pull request instead, which needs no right to write."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Only say what would go where, and show the model card.")
    ] = False,
    message: Annotated[
        str | None, typer.Option("--message", metavar="TEXT", help="Of the commit.", show_default="NAME, version N")
    ] = None,
    sign: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY", help="Sign it with this private key (lorary[sign]).")
    ] = None,
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Push a version to the Hub: all its files in one commit, the tag vN, a model card.

    Pushing the same version again changes nothing. Log in with hf auth login, or set $HF_TOKEN.

    Example: registry push legal acme/lorary-legal
    """
    registry = open_registry(store)
    registry.show(ref)
    with watch(f"pushing {ref}", as_json=as_json) as watching:
        done = registry.push(
            ref,
            destination,
            private=private,
            create_pr=create_pr,
            dry_run=dry_run,
            message=message,
            sign=sign,
            on_progress=watching.on_progress,
        )
    output.show(push_page(done), command="push", as_json=as_json)
    if done.state == "planned" and not as_json:
        output.hint(f"\nIts model card would be:\n\n{done.card}")


def push_page(done: "PushResult") -> Page:
    """What a push did."""
    new = [file for file in done.files if file.is_new]
    headings = {
        "pushed": "is on the Hub",
        "proposed": "is proposed as a pull request",
        "there": "is on the Hub already",
        "planned": "would go to the Hub",
    }
    here, there = of.reference(done.manifest), f"{done.repo}@{done.tag}"
    makes = line(there, faint(", a new repository")) if done.makes_repo else there
    total, fresh = sum(file.size for file in done.files), sum(file.size for file in new)
    sent = f"{plural(len(done.files), 'file')}, {size(total)}"
    sent += f"; {len(new)} new or changed, {size(fresh)}" if done.state != "there" else ""
    rows = [
        ("state", cell(done.state)),
        ("repository", cell(makes, there)),
        ("address", cell(f"{done.endpoint}/{done.repo}")),
        ("pull request", cell(done.pull_request)) if done.pull_request else None,
        ("commit", cell(done.commit)) if done.commit else None,
        ("files", cell(sent)),
        ("removed", cell(", ".join(done.removed))) if done.removed and done.state != "there" else None,
        ("digest", cell(done.manifest.digest)),
    ]
    is_there = done.state in ("pushed", "there") and not done.pull_request
    hints = (f"Others get it with: registry pull {there}",) if is_there else ()
    data = {
        "state": done.state,
        "name": done.manifest.name,
        "version": done.manifest.version,
        "digest": done.manifest.digest,
        "repo": done.repo,
        "endpoint": done.endpoint,
        "tag": done.tag,
        "commit": done.commit,
        "pull_request": done.pull_request,
        "makes_repo": done.makes_repo,
        "files": [asdict(file) for file in done.files],
        "removed": list(done.removed),
        "card": done.card,
    }
    return Page(data=data, blocks=(title(f"{here} {headings[done.state]}"), facts(rows)), hints=hints)


def pull(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="OWNER/REPO, or OWNER/REPO@REVISION, also with hf://.", show_default=False),
    ],
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="A tag such as v2, a branch or a commit.", show_default="main")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", help="The domain that it becomes.", show_default="its own name"),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", metavar="", help="Ask nobody; take it from the Hub's cache on this machine.")
    ] = False,
    signer: Annotated[
        Path | None,
        typer.Option("--require-signature", metavar="KEY", help="Only if this public key fits its signature."),
    ] = None,
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Pull a pack from the Hub: verified file by file, stored as one version, or not at all.

    Pulling it again changes nothing. A repeated command goes on where an interrupted one was.

    Example: registry pull acme/lorary-legal@v2
    """
    registry = open_registry(store)
    with watch(f"pulling {source}", as_json=as_json) as watching:
        done = registry.pull(
            source,
            revision=revision,
            name=name,
            offline=offline,
            signer=signer,
            on_progress=watching.on_progress,
        )
    output.show(pull_page(done), command="pull", as_json=as_json)


def pull_page(done: "PullResult") -> Page:
    """What a pull brought."""
    manifest, origin = done.manifest, done.origin
    here = of.reference(manifest)
    state = "is here" if done.is_new else "was here already" if not done.fetched else "is whole again"
    total, fresh = sum(file.size for file in manifest.files), sum(file.size for file in done.fetched)
    brought = f"{plural(len(done.fetched), 'file')} of {len(manifest.files)} fetched, {size(fresh)} of {size(total)}"
    rows = [
        ("version", cell(f"{here}, {state}")),
        ("from", cell(line(str(origin), faint(f" at {origin.endpoint}")), str(origin))),
        ("commit", cell(origin.commit)),
        ("files", cell(brought)),
        ("verified", cell(line(Span(f"{plural(len(manifest.files), 'file')} against the manifest", "good")))),
        ("signature", cell(Span("valid", "good"))) if done.is_signed else None,
        ("base", of.base(manifest)),
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
    return Page(data=data, blocks=(title(f"{here} {state}"), facts(rows)), hints=tuple(pull_hints(done)))


def _preservation(done: "PullResult") -> Cell:
    """Whether the bank that it was trained over is here."""
    shown = {
        "same": Span("the one that it was trained over is here", "good"),
        "other": Span("it was trained over another one than yours", "warn"),
        "unknown": Span("-"),
    }
    return cell(line(shown[done.preservation]), done.preservation)


def pull_hints(done: "PullResult") -> list[str]:
    """What a person should know of it, and can do with it."""
    manifest = done.manifest
    hints = [f"Use it: registry compose {of.reference(manifest)}"]
    if done.preservation == "other":
        owner = done.origin.repo.partition("/")[0]
        digest = brief(manifest.lineage["preservation"]["digest"])
        hints.append(f"Its KP bank is {digest}. If it was pushed too: registry pull {owner}/lorary-{GENERAL}")
    if manifest.name == GENERAL and not done.is_latest:
        hints.append(f"Yours stays in use; this one is used where it is named: {of.reference(manifest)}+DOMAIN")
    if not done.is_checked:
        hints.append("The Hub was not asked: there may be a newer version.")
    return hints


def localised(registry: "Registry", spec: str, *, as_json: bool) -> str:
    """The composition in the names of the registry; what it names on the Hub is pulled, and a person is told."""
    with watch("asking the Hub", as_json=as_json) as watching:
        found = registry.resolve_composition(spec, on_progress=watching.on_progress)
    if not as_json:
        for pulled in found.pulled:
            state = "pulled" if pulled.is_new else "here already"
            output.hint(f"{pulled.origin} is {of.reference(pulled.manifest)}, {state}")
        for traced in found.from_store:
            output.hint(f"{traced.origin} is {of.reference(traced.manifest)}; the Hub was not asked")
    return found.composition


def search(
    query: Annotated[
        str | None, typer.Argument(metavar="QUERY", help="Words in the name.", show_default="all packs")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Only packs for this base model.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="At most so many.")] = 20,
    as_json: Json = False,
) -> None:
    """Search the Hub for packs. What is shown is what their cards say; it is verified when a pack is pulled.

    Example: registry search legal --base meta-llama/Llama-3.2-1B
    """
    quiet_libraries()
    from ...registry.hub.client import Hub
    from ...registry.hub.search import search as search_hub

    with watch("searching the Hub", as_json=as_json) as watching:
        found = search_hub(query, base=base, limit=limit, hub=Hub(on_progress=watching.on_progress))
    output.show(search_page(found), command="search", as_json=as_json)


def search_page(found: "list[SearchResult]") -> Page:
    """The packs that were found."""
    columns = ("REPOSITORY", "DOMAIN", "VERSION", "BASE", "BITS/BYTE", "GAIN", "DOWNLOADS", "UPDATED")
    rows = [_found_row(pack) for pack in found]
    listed = table(columns, rows, right=("VERSION", "BITS/BYTE", "GAIN", "DOWNLOADS"), tight=("REPOSITORY", "UPDATED"))
    hint = f"Get one: registry pull {found[0].repo}" if found else "Nothing was found. All packs: registry search"
    return Page(data={"packs": [asdict(pack) for pack in found]}, blocks=(listed,), hints=(hint,))


def _found_row(pack: "SearchResult") -> list[Cell]:
    gain = of.lowered(pack.bits_per_byte_of_base, pack.bits_per_byte)
    return [
        cell(pack.repo),
        cell(pack.name or "-"),
        cell(str(pack.version or "-")),
        cell(pack.base or "-"),
        of.number(pack.bits_per_byte),
        cell(percent(gain, digits=1), exact(gain)),
        cell(f"{pack.downloads:,}", pack.downloads),
        of.day(pack.updated),
    ]
