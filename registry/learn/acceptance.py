"""The acceptance check between a retrained version and the alias `latest`.

In the composition of KP and the domain, the new version must predict the parent's held-out text as well as the parent
does, within a tolerance:

    bits per byte of the new version <= (1 + tolerance) * bits per byte of the parent

So must each kind of that text with enough rows, unless the interval of its change includes zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...domains.data.corpus import corpus_digest, limit_bytes
from ...domains.data.example import Example
from ...domains.progress import Progress
from ...domains.scoring.language import score_language
from ..measure.evaluate import compose_with_preservation
from ..measure.held_out import MAX_SCORED_BYTES
from ..measure.kinds import KindChange, KindPortrait, kind_changes, portrait
from ..pack.pack import DomainPack
from .run import TrainingRun


@dataclass(frozen=True, kw_only=True)
class AcceptanceCheck:
    """Scores of parent and new version on the same text; bits per byte, lower is better."""

    parent: float
    new: float
    bytes: int  # of text
    data: str  # digest of the text
    tolerance: float  # share of the parent's
    kinds: tuple[KindChange, ...] = ()  # the worst first; none if the text is of one kind
    portraits: tuple[KindPortrait, ...] = field(default=(), compare=False)  # of failing kinds; text, so never stored

    @property
    def holds(self) -> bool:
        """Whether the new version is not worse by more than the tolerance, on the whole text and on each kind."""
        return self.new <= self.parent * (1 + self.tolerance) and not self.failing

    @property
    def failing(self) -> tuple[KindChange, ...]:
        """The kinds that are worse by more than the tolerance."""
        return tuple(kind for kind in self.kinds if kind.is_worse(self.tolerance))

    @property
    def change(self) -> float:
        """Relative change of bits per byte from the parent; negative where the new version is better."""
        return self.new / self.parent - 1

    def as_json(self) -> dict[str, Any]:
        """Return what the manifest records: of kinds their names and scores."""
        scores = {key: getattr(self, key) for key in ("parent", "new", "bytes", "data", "tolerance")}
        kinds = {"kinds": [kind.as_json() for kind in self.kinds]} if self.kinds else {}
        return scores | kinds | {"metric": "bits per byte", "holds": self.holds}

    @classmethod
    def from_json(cls, found: dict[str, Any], *, tolerance: float) -> "AcceptanceCheck":
        """Read the scores in a manifest, to be judged with another tolerance."""
        kinds = tuple(KindChange(**(one | {"interval": tuple(one["interval"])})) for one in found.get("kinds", ()))
        return cls(**{key: found[key] for key in ("parent", "new", "bytes", "data")}, tolerance=tolerance, kinds=kinds)

    def described(self, texts: Sequence[Example], rises: Sequence[float] | None = None) -> "AcceptanceCheck":
        """Return the check with what people need to recognize the failing kinds among these texts."""
        return replace(self, portraits=tuple(portrait(texts, kind.kind, rises) for kind in self.failing))


def check_acceptance(
    run: TrainingRun, parent: DomainPack, texts: Sequence[Example], *, tolerance: float
) -> AcceptanceCheck:
    """Score parent and new version on the same text."""
    scores = {}
    for what, pack in (("parent", parent), ("new", run.pack)):
        scores[what] = score_language(
            compose_with_preservation(run.base, run.kp, pack, run.name),
            run.base.tokenizer,
            texts,
            max_bytes=MAX_SCORED_BYTES,
            on_progress=lambda done, total, what=what: run.on_progress(
                Progress(f"acceptance check: the {what} version", done, total)
            ),
        )
    chosen = limit_bytes(texts, MAX_SCORED_BYTES)
    before, now, sizes = scores["parent"].text_nats, scores["new"].text_nats, scores["new"].text_bytes
    rises = [(new - old) / max(size, 1) for old, new, size in zip(before, now, sizes, strict=True)]
    check = AcceptanceCheck(
        parent=round(scores["parent"].bits_per_byte, 5),
        new=round(scores["new"].bits_per_byte, 5),
        bytes=scores["new"].bytes,
        data=corpus_digest(texts),
        tolerance=tolerance,
        kinds=kind_changes(chosen, before, now, sizes),
    )
    return check.described(chosen, rises)
