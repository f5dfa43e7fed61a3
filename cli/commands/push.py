"""`registry push`: a version to the Hugging Face Hub."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import Json, Reference, StorePath
from ..show import facts, output
from ..show.numbers import plural, size
from ..show.page import Page, cell, faint, fields, line, title
from ..show.progress import show_progress
from ..startup import open_registry

if TYPE_CHECKING:
    from ...registry.hub.push import PushResult
    from ...registry.store.manifest import PackManifest


def push(
    ref: Reference,
    destination: Annotated[
        str | None,
        typer.Argument(
            metavar="DEST", help="OWNER/REPO on the Hub, or an OWNER.", show_default="your account, lorary-NAME"
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", metavar="", help="Make a newly created repository private.")
    ] = False,
    create_pr: Annotated[
        bool,
        typer.Option("--create-pr", metavar="", help="Open a pull request instead; needs no write access."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Only report what would be pushed, and show the model card.")
    ] = False,
    message: Annotated[
        str | None, typer.Option("--message", metavar="TEXT", help="Commit message.", show_default="NAME, version N")
    ] = None,
    sign: Annotated[
        Path | None,
        typer.Option("--sign", metavar="KEY", help="Sign the pack with this private key; needs lorary[sign]."),
    ] = None,
    store: StorePath = None,
    as_json: Json = False,
) -> None:
    """Push a version to the Hub: all files in one commit, the tag vN, and a model card.

    Pushing the same version again changes nothing. To authenticate, run hf auth login or set $HF_TOKEN.

    Example: registry push legal acme/lorary-legal
    """
    registry = open_registry(store)
    warn_of_named_others(registry.show(ref), as_json=as_json)
    with show_progress(f"pushing {ref}", as_json=as_json) as progress:
        done = registry.push(
            ref,
            destination,
            private=private,
            create_pr=create_pr,
            dry_run=dry_run,
            message=message,
            sign=sign,
            on_progress=progress.on_progress,
        )
    output.show(push_page(done), command="push", as_json=as_json)
    if done.state == "planned" and not as_json:
        output.hint(f"\nThe model card would be:\n\n{done.card}")


def warn_of_named_others(manifest: "PackManifest", *, as_json: bool) -> None:
    """Warn if a pack that leaves the registry names other domains of it."""
    others = manifest.named_others
    if others and as_json:
        output.write_json_line({"names_others": list(others)})
    elif others:
        text = f"Warning: the manifest of {facts.reference(manifest)} names other domains of this registry: "
        output.hint(f"{text}{', '.join(others)}. One that is trained now does not: registry retrain {manifest.name}")


def push_page(done: "PushResult") -> Page:
    """Make the page about a push."""
    new = [file for file in done.files if file.is_new]
    headings = {
        "pushed": "was pushed to the Hub",
        "proposed": "was proposed as a pull request",
        "there": "is on the Hub already",
        "planned": "would be pushed to the Hub",
    }
    here, there = facts.reference(done.manifest), f"{done.repo}@{done.tag}"
    repository = line(there, faint(", a new repository")) if done.makes_repo else there
    total, sent = sum(file.size for file in done.files), sum(file.size for file in new)
    files = f"{plural(len(done.files), 'file')}, {size(total)}"
    files += f"; {len(new)} new or changed, {size(sent)}" if done.state != "there" else ""
    rows = [
        ("state", cell(done.state)),
        ("repository", cell(repository, there)),
        ("address", cell(f"{done.endpoint}/{done.repo}")),
        ("pull request", cell(done.pull_request)) if done.pull_request else None,
        ("commit", cell(done.commit)) if done.commit else None,
        ("files", cell(files)),
        ("removed", cell(", ".join(done.removed))) if done.removed and done.state != "there" else None,
        ("digest", cell(done.manifest.digest)),
    ]
    is_there = done.state in ("pushed", "there") and not done.pull_request
    hints = (f"To pull it elsewhere: registry pull {there}",) if is_there else ()
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
    return Page(data=data, blocks=(title(f"{here} {headings[done.state]}"), fields(rows)), hints=hints)
