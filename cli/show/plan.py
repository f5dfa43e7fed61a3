"""The plan of an addition: what will be learned from what, known before anything heavy is loaded."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...adapters.allocation import allocate
from ...adapters.composition import GENERAL
from ...adapters.config import BankConfig
from ...domains.data.corpus import Source
from .charts import layers
from .numbers import plural, size

if TYPE_CHECKING:
    from ...registry import Registry


@dataclass(frozen=True, kw_only=True)
class Addition:
    """A domain that is about to be added."""

    name: str
    files: tuple[str, ...]
    rows: int
    bytes: int
    experts: int  # over all decoder layers
    by_layer: str
    rank: int
    steps: str

    def __str__(self) -> str:
        text = f"{', '.join(self.files)}: {plural(self.rows, 'row')}, {size(self.bytes)}"
        experts = f"{plural(self.experts, 'expert')} of rank {self.rank}, by layer {self.by_layer}"
        return f"Adding {self.name} from {text}\n{experts}, {self.steps}; everything older stays frozen"


def plan_addition(
    registry: "Registry", name: str, data: list[Source], bank: BankConfig, *, steps: int | None
) -> Addition:
    """The plan.

    Raises:
        LoraryError: The name, the data or the form of the experts is off, or there is no KP bank yet.
    """
    from ...registry.measure.held_out import check_new_name, read_domain_data, spec_of

    check_new_name(registry.store, name)
    depth = len(registry.plan(GENERAL).experts_per_layer)
    is_measured = bank.schedule == "data"
    schedule = "uniform" if is_measured else bank.schedule  # the total is always the same
    counts = allocate(depth, experts=bank.experts, schedule=schedule, expert_free=bank.expert_free)
    found = read_domain_data(spec_of(name, data), data).record
    return Addition(
        name=name,
        files=tuple(found["files"]),
        rows=found["rows"],
        bytes=found["bytes"],
        experts=sum(counts),
        by_layer="as the data needs" if is_measured else layers(counts),
        rank=bank.rank,
        steps=plural(steps, "step") if steps else "as many steps as the data needs",
    )
