"""Progress reports of long operations: the library emits them, the command line shows them."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """Progress of one stage of an operation."""

    stage: str  # shown to the user: "training legal"
    done: int
    total: int  # 0 if unknown
    figures: dict[str, float] = field(default_factory=dict)  # loss, tokens_per_second, ...


OnProgress = Callable[[Progress], None]


def silent(_progress: Progress) -> None:
    """Ignore the progress."""
