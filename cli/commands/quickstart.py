"""`registry quickstart`: a registry with two domains on the bundled base model, composed, asked and measured.

An interrupted run leaves a marker in the registry's folder; the same command resumes it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...adapters.composition import GENERAL
from ...adapters.config import TrainingConfig
from ...domains.errors import ConflictError
from ...domains.progress import OnProgress
from ..options import Json
from ..report.terminal import heat_table
from ..show import facts, output
from ..show.numbers import duration, exact
from ..show.page import Page, Paragraph, Span, cell, faint, fields, line, title
from ..show.progress import show_progress
from ..show.slots import answer_data
from ..startup import quiet_libraries, store_option

if TYPE_CHECKING:
    from ...registry import Registry
    from ...registry.compose.generate import Answer
    from ...registry.compose.plan import Plan
    from ...registry.measure.report import RetentionReport
    from ...registry.store.manifest import PackManifest

DOMAINS = ("medicine", "legal")
COMPOSITION = "+".join(DOMAINS)
PROMPT = "The patient has a fever and a cough. The doctor"
MARKER = "quickstart-unfinished"

FAST_STEPS = 4
FAST_BYTES = 4000

OnStep = Callable[[str, float | None], None]
Fast = Annotated[
    bool,
    typer.Option(
        "--fast",
        metavar="",
        help=f"Smoke test of about a minute: train {FAST_STEPS} steps and measure {FAST_BYTES} bytes per domain. "
        "Answers and scores are not meaningful.",
    ),
]


def quickstart(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A new folder for the registry.")] = Path(".lorary"),
    fast: Fast = False,
    as_json: Json = False,
) -> None:
    """Build a registry with two domains, ask it and measure it; needs no network and no GPU.

    Example: registry quickstart
    """
    quiet_libraries()
    with show_progress("loading the base model", as_json=as_json) as progress:

        def on_step(step: str, seconds: float | None) -> None:
            if seconds is None:
                progress.start(step)
            else:
                progress.log(f"✓ {step}  {duration(seconds)}")

        limits = {"steps": FAST_STEPS, "max_bytes": FAST_BYTES} if fast else {}
        result = run_quickstart(path, **limits, on_progress=progress.on_progress, on_step=on_step)
    output.show(quickstart_page(result, path), command="quickstart", as_json=as_json)


@dataclass(frozen=True, kw_only=True)
class QuickstartResult:
    """What the quickstart made."""

    registry: "Registry"
    manifests: "tuple[PackManifest, ...]"  # KP first, then the domains in the order in which they were added
    plan: "Plan"
    answer: "Answer"
    retention: "RetentionReport"
    seconds: float


def run_quickstart(
    folder: Path, *, steps: int | None = None, max_bytes: int | None = None, on_progress: OnProgress, on_step: OnStep
) -> QuickstartResult:
    """Run all steps of the quickstart; skip those that an interrupted run finished.

    Args:
        folder: The registry's folder.
        steps: Optimizer steps of each bank; by default those that the library needs.
        max_bytes: Held-out text of each domain that is scored for the retention matrix.
        on_step: Called with each step's name and None when it begins, and with its seconds when it ends.

    Raises:
        ConflictError: The folder holds a registry that the quickstart did not begin.
    """
    began = time.monotonic()
    marker = _mark_unfinished(folder)
    with _step("general: train the KP bank on general text", on_step):
        registry = _init_registry(folder, TrainingConfig(steps=steps), on_progress)
    for name in DOMAINS:
        if not registry.store.versions(name):
            with _step(f"{name}: train new experts, everything older frozen", on_step):
                registry.add_domain(name, training=TrainingConfig(steps=steps), on_progress=on_progress)
    with _step(f"{COMPOSITION}: compose and generate", on_step):
        answer = registry.generate(registry.compose(COMPOSITION), PROMPT, temperature=0.5, raw=True)
    with _step("retention: score every domain after every step", on_step):
        retention = registry.retention(DOMAINS, questions=False, max_bytes=max_bytes, on_progress=on_progress)
    marker.unlink(missing_ok=True)
    return QuickstartResult(
        registry=registry,
        manifests=tuple(registry.show(name) for name in (GENERAL, *DOMAINS)),
        plan=registry.plan(COMPOSITION),
        answer=answer,
        retention=retention,
        seconds=time.monotonic() - began,
    )


def _mark_unfinished(folder: Path) -> Path:
    """Write the marker of an unfinished quickstart into the folder."""
    marker = folder / MARKER
    if (folder / "store.json").exists() and not marker.exists():
        raise ConflictError(
            f"There is a registry in {folder} already.",
            cause="quickstart makes a new one",
            fix=f"choose another folder: registry quickstart other-folder; or remove it: rm -r {folder}",
        )
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text("registry quickstart was interrupted; repeat it to go on\n", encoding="utf-8")
    return marker


def _init_registry(folder: Path, training: TrainingConfig, on_progress: OnProgress) -> "Registry":
    """Return the registry with its KP bank; train the bank unless an earlier run did."""
    from ...registry import Registry

    if (folder / "store.json").exists():
        registry = Registry.open(folder)
        if registry.store.versions(GENERAL):
            return registry
    return Registry.init(folder, training=training, on_progress=on_progress)


@contextmanager
def _step(step: str, on_step: OnStep) -> Iterator[None]:
    began = time.monotonic()
    on_step(step, None)
    yield
    on_step(step, time.monotonic() - began)


def quickstart_page(result: QuickstartResult, path: Path) -> Page:
    """Make the page about a finished quickstart."""
    newest = result.manifests[-1]
    where = store_option(path)
    rows = [
        ("registry", cell(str(result.registry.store.path))),
        ("composed", cell(result.plan.pinned)),
        ("frozen", facts.proof(newest)),
        ("time", cell(duration(result.seconds), exact(result.seconds))),
    ]
    return Page(
        data=_data(result),
        blocks=(
            title(f"{COMPOSITION} answers"),
            Paragraph(line(faint(PROMPT), Span(" " + result.answer.text.strip(), "strong"))),
            title("Retention", faint("   bits per byte after each step, lower is better")),
            heat_table(result.retention.bits),
            title("Routing", faint("   compared with each domain's own experts alone")),
            facts.score_table(row for manifest in result.manifests[1:] for row in facts.scores(manifest).rows[:1]),
            fields(rows),
        ),
        hints=(
            "The pocket base (4.3M parameters, 9 MB) is for tests and demos only: its answers are not meaningful.",
            "Try next:",
            f"  registry list{where}",
            f'  registry route "The tenant shall pay the landlord the rent due under this agreement."{where}',
            f'  registry generate {COMPOSITION} "The patient was given" --raw --show-route{where}',
            f"  registry report{where}",
        ),
    )


def _data(result: QuickstartResult) -> dict[str, object]:
    return {
        "store": str(result.registry.store.path),
        "composition": COMPOSITION,
        "pinned": result.plan.pinned,
        "domains": {
            manifest.name: {"version": manifest.version, "digest": manifest.digest, "scores": manifest.evaluation}
            for manifest in result.manifests
        },
        "prompt": PROMPT,
        "answer": answer_data(result.answer),
        "retention": result.retention.as_json(),
        "share_of_oracle_gain": {
            manifest.name: manifest.evaluation["share_of_oracle_gain"] for manifest in result.manifests[1:]
        },
        "proof": result.manifests[-1].proof,
        "seconds": round(result.seconds, 1),
    }
