"""The gate between a retrained version and the alias `latest`.

In the composition of KP and the domain, the new version must predict the parent's held-out text as well as the parent
does, within a tolerance:

    bits per byte of the new version <= (1 + tolerance) * bits per byte of the parent
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...domains.data.corpus import corpus_digest
from ...domains.data.example import Example
from ...domains.progress import Progress
from ...domains.scoring.language import score_language
from ..measure.evaluate import with_preservation
from ..measure.held_out import MAX_SCORED_BYTES
from ..pack.pack import DomainPack
from .context import Ground


@dataclass(frozen=True, kw_only=True)
class Gate:
    """How parent and new version predict the same text; bits per byte, lower is better."""

    parent: float
    new: float
    bytes: int  # of text
    data: str  # digest of the text
    tolerance: float  # share of the parent's

    @property
    def holds(self) -> bool:
        """Whether the new version is not worse by more than the tolerance."""
        return self.new <= self.parent * (1 + self.tolerance)

    @property
    def change(self) -> float:
        """By what share the new version is worse; below 0 where it is better."""
        return self.new / self.parent - 1

    def as_json(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self) | {"metric": "bits per byte", "holds": self.holds}

    @classmethod
    def from_json(cls, found: dict[str, Any], *, tolerance: float) -> "Gate":
        """The scores in a manifest, under a tolerance of one's own."""
        return cls(**{key: found[key] for key in ("parent", "new", "bytes", "data")}, tolerance=tolerance)


def measure_gate(
    ground: Ground, parent: DomainPack, new: DomainPack, name: str, texts: Sequence[Example], *, tolerance: float
) -> Gate:
    """Scores both versions on the same text."""
    scores = {}
    for what, pack in (("parent", parent), ("new", new)):
        scores[what] = score_language(
            with_preservation(ground.base, ground.preservation, pack, name),
            ground.base.tokenizer,
            texts,
            max_bytes=MAX_SCORED_BYTES,
            on_progress=lambda done, total, what=what: ground.on_progress(
                Progress(f"gate: the {what} version", done, total)
            ),
        )
    return Gate(
        parent=round(scores["parent"].bits_per_byte, 5),
        new=round(scores["new"].bits_per_byte, 5),
        bytes=scores["new"].bytes,
        data=corpus_digest(texts),
        tolerance=tolerance,
    )
