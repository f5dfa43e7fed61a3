"""`registry quickstart`: the whole of it in one command."""

from pathlib import Path
from typing import Annotated

import typer

from ..options import Json
from ..quickstart import COMPOSITION, PROMPT, Tour, take_tour
from ..report.terminal import heat_table
from ..show import facts as of
from ..show import output
from ..show.numbers import duration, exact
from ..show.page import Page, Span, Words, cell, facts, faint, line, title
from ..show.slots import answer_data
from ..show.watch import watch
from ..startup import quiet_libraries, store_option

FAST_STEPS = 4
FAST_BYTES = 4000
Fast = Annotated[
    bool,
    typer.Option(
        "--fast",
        metavar="",
        help=f"Train {FAST_STEPS} steps for each domain and measure {FAST_BYTES} bytes of each: a smoke test, about a "
        "minute. It skips most of the training, so answers and scores mean nothing.",
    ),
]


def quickstart(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A new folder for the registry.")] = Path(".lorary"),
    fast: Fast = False,
    as_json: Json = False,
) -> None:
    """Take the tour: a registry with two domains, composed, asked and measured, without network or GPU.

    Example: registry quickstart
    """
    quiet_libraries()
    with watch("loading the base model", as_json=as_json) as watching:

        def tell(what: str, seconds: float | None) -> None:
            if seconds is None:
                watching.wait(what)
            else:
                watching.say(f"✓ {what}  {duration(seconds)}")

        limits = {"steps": FAST_STEPS, "max_bytes": FAST_BYTES} if fast else {}
        tour = take_tour(path, **limits, on_progress=watching.on_progress, on_step=tell)
    output.show(tour_page(tour, path), command="quickstart", as_json=as_json)


def tour_page(tour: Tour, path: Path) -> Page:
    """What the tour did."""
    newest = tour.manifests[-1]
    proof = of.proof(newest)
    where = store_option(path)
    rows = [
        ("registry", cell(str(tour.registry.store.path))),
        ("composed", cell(tour.plan.pinned)),
        ("frozen", proof) if proof else None,
        ("time", cell(duration(tour.seconds), exact(tour.seconds))),
    ]
    return Page(
        data=_data(tour),
        blocks=(
            title(f"{COMPOSITION} answers"),
            Words(line(faint(PROMPT), Span(" " + tour.answer.text.strip(), "strong"))),
            title("What is kept", faint("   bits per byte after each step, lower is better")),
            heat_table(tour.retention.bits),
            title("What routing keeps", faint("   of what a domain's own experts gain")),
            of.score_table(row for manifest in tour.manifests[1:] for row in of.scores(manifest).rows[:1]),
            facts(rows),
        ),
        hints=(
            "The pocket base is 9 MB: it shows how experts and routing work; do not expect sense from its answers.",
            "Try next:",
            f"  registry list{where}",
            f'  registry route "The tenant shall pay the landlord the rent due under this agreement."{where}',
            f'  registry generate {COMPOSITION} "The patient was given" --show-route{where}',
            f"  registry report{where}",
        ),
    )


def _data(tour: Tour) -> dict[str, object]:
    return {
        "store": str(tour.registry.store.path),
        "composition": COMPOSITION,
        "pinned": tour.plan.pinned,
        "domains": {
            manifest.name: {"version": manifest.version, "digest": manifest.digest, "scores": manifest.evaluation}
            for manifest in tour.manifests
        },
        "prompt": PROMPT,
        "answer": answer_data(tour.answer),
        "retention": tour.retention.as_json(),
        "share_of_oracle_gain": {
            manifest.name: manifest.evaluation["share_of_oracle_gain"] for manifest in tour.manifests[1:]
        },
        "proof": tour.manifests[-1].proof,
        "seconds": round(tour.seconds, 1),
    }
