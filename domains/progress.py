"""Progress of long work: the library tells, the command line shows."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """How far a stage has come."""

    stage: str  # what is being done, for a person: "training legal"
    done: int
    total: int  # 0 where nobody knows how far it is
    figures: dict[str, float] = field(default_factory=dict)  # loss, tokens_per_second, ...


OnProgress = Callable[[Progress], None]


def silent(_progress: Progress) -> None:
    """Tells nobody."""
