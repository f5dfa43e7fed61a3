"""The quickstart: a registry with two domains, composed, asked and measured, on the built-in base model.

An interrupted one leaves a marker in the registry's folder; repeated, it goes on where it was.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.composition import GENERAL
from ..domains.errors import ConflictError
from ..domains.progress import OnProgress

if TYPE_CHECKING:
    from ..adapters.config import TrainingConfig
    from ..registry import Registry
    from ..registry.compose.generate import Answer
    from ..registry.compose.plan import Plan
    from ..registry.measure.report import RetentionReport
    from ..registry.store.manifest import PackManifest

DOMAINS = ("medicine", "legal")
COMPOSITION = "+".join(DOMAINS)
PROMPT = "The patient has a fever and a cough. The doctor"
MARKER = "quickstart-unfinished"

OnStep = Callable[[str, float | None], None]


@dataclass(frozen=True, kw_only=True)
class Tour:
    """What the quickstart did."""

    registry: "Registry"
    manifests: "tuple[PackManifest, ...]"  # KP first, in the order in which they were added
    plan: "Plan"
    answer: "Answer"
    retention: "RetentionReport"
    seconds: float


def take_tour(
    folder: Path, *, steps: int | None = None, max_bytes: int | None = None, on_progress: OnProgress, on_step: OnStep
) -> Tour:
    """Runs the quickstart.

    Args:
        folder: Where the registry goes.
        steps: Optimizer steps of each bank; by default what the library trains.
        max_bytes: Held-out text of each domain that is measured for the retention matrix.
        on_step: Told what begins, with None, and when it has ended, with the seconds it took.

    Raises:
        ConflictError: There is a registry in the folder.
    """
    began = time.monotonic()
    marker = _claim(folder)
    with _step("general: the KP bank, from general text", on_step):
        registry = _ready(folder, steps, on_progress)
    for name in DOMAINS:
        if not registry.store.versions(name):
            with _step(f"{name}: new experts, everything older frozen", on_step):
                registry.add_domain(name, training=_training(steps), on_progress=on_progress)
    with _step(f"{COMPOSITION}: composed and asked", on_step):
        answer = registry.generate(registry.compose(COMPOSITION), PROMPT, temperature=0.5)
    with _step("retention: every step measured on every domain", on_step):
        retention = registry.retention(DOMAINS, questions=False, max_bytes=max_bytes, on_progress=on_progress)
    marker.unlink(missing_ok=True)
    return Tour(
        registry=registry,
        manifests=tuple(registry.show(name) for name in (GENERAL, *DOMAINS)),
        plan=registry.plan(COMPOSITION),
        answer=answer,
        retention=retention,
        seconds=time.monotonic() - began,
    )


def _claim(folder: Path) -> Path:
    """Marks the folder as an unfinished quickstart's."""
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


def _training(steps: int | None) -> "TrainingConfig":
    from ..adapters.config import TrainingConfig

    return TrainingConfig(steps=steps)


def _ready(folder: Path, steps: int | None, on_progress: OnProgress) -> "Registry":
    """The registry with its KP bank, trained now unless an earlier run did."""
    from ..registry import Registry

    if (folder / "store.json").exists():
        registry = Registry.open(folder)
        if registry.store.versions(GENERAL):
            return registry
    return Registry.init(folder, training=_training(steps), on_progress=on_progress)


@contextmanager
def _step(what: str, on_step: OnStep) -> Iterator[None]:
    began = time.monotonic()
    on_step(what, None)
    yield
    on_step(what, time.monotonic() - began)
