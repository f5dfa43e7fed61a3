"""GateTables: what the gates of one decoder layer are computed from, laid out for one product with the hidden state.

    scores = (hidden rows^T) / |hidden|          of the E experts first, then of the ranks
    g[t, r] = slot_gate[t, slot(r)] * softmax(scores in group of expert(r))[expert(r)] * 2 sigmoid(scores[t, E + r])

A softmax group is the experts of one generation of one slot.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EPSILON = 1e-6  # the least length that a hidden state is divided by


@dataclass(kw_only=True)
class GateTables:
    """Rows and places of some slots' experts and ranks."""

    rows: Float[Tensor, "scores width"]  # float32
    same_group: Float[Tensor, "experts experts"]  # 1 where two experts share a softmax group, else 0
    slot_of_expert: Int[Tensor, " experts"]
    expert_of_rank: Int[Tensor, " rank"]
    slot_of_rank: Int[Tensor, " rank"]
    # the softmax group of a rank's expert, itself included; -1 pads smaller groups
    softmax_group_of_rank: Int[Tensor, "rank most"]
    fixed_gate: Float[Tensor, " rank"] | None  # constant expert gate times rank gate, of a static composition

    def __post_init__(self) -> None:
        # once, not in every call; torch.compile does not follow a cached_property
        self.sizes = [len(self.slot_of_expert), len(self.expert_of_rank)]  # how many experts and ranks
        self.half_group = 0.5 * self.same_group

    def only(self, slots: tuple[int, ...]) -> "GateTables":
        """The same of some of the slots; softmaxes run inside a slot, so that none changes."""
        wanted = torch.tensor(slots, dtype=torch.long, device=self.rows.device)
        experts = torch.isin(self.slot_of_expert, wanted)
        ranks = torch.isin(self.slot_of_rank, wanted)
        new_place = experts.cumsum(0) - 1
        softmax_group = self.softmax_group_of_rank[ranks]
        return GateTables(
            rows=self.rows[torch.cat([experts, ranks])] if self.fixed_gate is None else self.rows,
            same_group=self.same_group[experts][:, experts],
            slot_of_expert=self.slot_of_expert[experts],
            expert_of_rank=new_place[self.expert_of_rank[ranks]],
            slot_of_rank=self.slot_of_rank[ranks],
            softmax_group_of_rank=torch.where(softmax_group >= 0, new_place[softmax_group.clamp(min=0)], -1),
            fixed_gate=None if self.fixed_gate is None else self.fixed_gate[ranks],
        )


def softmax_groups_of(same_group: Bool[Tensor, "experts experts"]) -> Int[Tensor, "experts most"]:
    """The members of each expert's group in order, -1 where a group has fewer than the largest."""
    count = len(same_group)
    members = torch.where(same_group, torch.arange(count), count).sort(1).values
    members = members[:, : int(same_group.sum(1).max()) if count else 0]
    return torch.where(members < count, members, -1)
