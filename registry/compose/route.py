"""Report the routing of a text: its slot gates, and its similarity to the prototypes of each domain."""

from dataclasses import dataclass

import torch

from ...adapters.composition import GENERAL
from ...adapters.layer.routing import recording_routes, routing_of
from ...domains.base_model import max_positions
from ...domains.data.prompt import prompt_ids
from ...domains.errors import InputError
from ...domains.statistics.measure import text_means
from ...domains.statistics.prototypes import PrototypeIndex
from ..base.load import LoadedBase
from ..pack.pack import DomainPack, one_edition
from .build import compose_packs
from .generate import check_text
from .notebook import html_table
from .plan import Plan


@dataclass(frozen=True, kw_only=True)
class RouteReport:
    """Routing of one text."""

    gates: dict[str, float]  # slot gates after the whole text, largest first
    margin: float  # largest slot gate minus the second largest
    taken_by: str  # slot with the largest gate; general means that the base model and KP answer
    tokens: int
    similarity: dict[str, float]  # cosine of the text's features and each domain's nearest prototype
    left_out: tuple[str, ...] = ()  # domains of the registry that have no text, and so are never routed to

    def __repr__(self) -> str:
        gates = ", ".join(f"{name}: {gate:.3f}" for name, gate in self.gates.items())
        rest = f", left_out={self.left_out}" if self.left_out else ""
        return f"RouteReport(taken_by={self.taken_by!r}, margin={self.margin:.3f}, gates={{{gates}}}{rest})"

    def _repr_html_(self) -> str:
        caption = f"Taken by {self.taken_by}, margin {self.margin:.3f}, {self.tokens} tokens"
        similarity = {name: f"{value:.2f}" for name, value in self.similarity.items()}
        rows = [(name, f"{gate:.3f}", similarity.get(name, "")) for name, gate in self.gates.items()]
        return html_table(caption, ("slot", "slot gate", "similarity"), rows)


@torch.inference_mode()
def route_text(plan: Plan, packs: list[DomainPack], base: LoadedBase, text: str, *, raw: bool = False) -> RouteReport:
    """Route a text, as a prompt that is read as a whole, in a composition of these packs, one for each slot.

    Args:
        plan: The composition.
        packs: One for each slot.
        base: The base model.
        text: A prompt, which is a user's turn if the tokenizer has a chat template.
        raw: Take the text as it is.

    Raises:
        InputError: The text has no tokens or is longer than the base model's context, or the composition is static.
    """
    if plan.static:
        raise InputError("A static composition does not route.", fix="leave out --static")
    check_text(text, "The text")
    found = prompt_ids(text, base.tokenizer, raw=raw)
    if not found or not text.strip():
        raise InputError("The text is empty.", fix='registry route "some text"')
    context = max_positions(base.model)
    if context is not None and len(found) > context:
        raise InputError(
            "The text is too long.",
            cause=f"its {len(found)} tokens exceed the base model's context of {context}",
            fix="route a part of it",
        )
    model = compose_packs(plan, packs, base)
    ids = torch.tensor([found], device=base.model.device)
    mask = torch.ones_like(ids)
    with recording_routes(model) as routes, routing_of(model).reading_prompts(ids.shape[1]):
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    by_slot = dict(zip((slot.name for slot in plan.slots), routes[-1].slot_gate[0, -1].tolist(), strict=True))
    ordered = dict(sorted(by_slot.items(), key=lambda item: -item[1]))
    values = list(ordered.values())
    return RouteReport(
        gates=ordered,
        margin=values[0] - values[1] if len(values) > 1 else 1.0,
        taken_by=next(iter(ordered)),
        tokens=ids.shape[1],
        similarity=_similarity(plan, packs, base, ids),
    )


def _similarity(plan: Plan, packs: list[DomainPack], base: LoadedBase, ids: torch.Tensor) -> dict[str, float]:
    """Return the cosine of a text's mean features and each domain's nearest prototype, nearest domain first."""
    parts = one_edition(packs, base.layout.width)
    first, mask = parts[0].is_first_edition, torch.ones_like(ids)
    means = text_means(base.model, base.layout, ids, mask, layer=packs[0].feature_layer, first_edition=first)
    names = [slot.name for slot in plan.slots]
    domains = [(name, part.prototypes) for name, part in zip(names, parts, strict=True) if name != GENERAL]
    index = PrototypeIndex([name for name, _ in domains], [vectors for _, vectors in domains])
    return {n.name: n.similarity for n in index.neighbours(means - parts[0].statistics.feature_mean.float())}
