"""GateTables: weights and indices of one decoder layer's gates, laid out for one product with the hidden state.

    scores = (hidden rows^T) / |hidden|          of the E experts first, then of the ranks
    g[t, r] = slot_gate[t, slot(r)] * softmax(scores in group of expert(r))[expert(r)] * 2 sigmoid(scores[t, E + r])

The experts of one generation of one slot form a softmax group.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EPSILON = 1e-6  # lower bound of the norm that hidden states are divided by


@dataclass(kw_only=True)
class GateTables:
    """Gate weights and indices of the experts and ranks of some slots."""

    rows: Float[Tensor, "scores width"]  # float32
    same_group: Float[Tensor, "experts experts"]  # 1 where two experts share a softmax group, else 0
    slot_of_expert: Int[Tensor, " experts"]
    expert_of_rank: Int[Tensor, " rank"]
    slot_of_rank: Int[Tensor, " rank"]
    softmax_group_of_rank: Int[Tensor, "rank group"]  # experts in the group of each rank's expert, padded with -1
    fixed_gate: Float[Tensor, " rank"] | None  # constant expert gate * rank gate of a static composition

    def __post_init__(self) -> None:
        # not a cached_property, which torch.compile does not trace
        self.sizes = [len(self.slot_of_expert), len(self.expert_of_rank)]  # number of experts, number of ranks
        self.half_group = 0.5 * self.same_group

    def select_slots(self, slots: tuple[int, ...]) -> "GateTables":
        """Return the tables of some slots; their gates stay the same, since no softmax group spans two slots."""
        selected = torch.tensor(slots, dtype=torch.long, device=self.rows.device)
        experts = torch.isin(self.slot_of_expert, selected)
        ranks = torch.isin(self.slot_of_rank, selected)
        new_index = experts.cumsum(0) - 1
        softmax_group = self.softmax_group_of_rank[ranks]
        return GateTables(
            rows=self.rows[torch.cat([experts, ranks])] if self.fixed_gate is None else self.rows,
            same_group=self.same_group[experts][:, experts],
            slot_of_expert=self.slot_of_expert[experts],
            expert_of_rank=new_index[self.expert_of_rank[ranks]],
            slot_of_rank=self.slot_of_rank[ranks],
            softmax_group_of_rank=torch.where(softmax_group >= 0, new_index[softmax_group.clamp(min=0)], -1),
            fixed_gate=None if self.fixed_gate is None else self.fixed_gate[ranks],
        )


def group_members(same_group: Bool[Tensor, "experts experts"]) -> Int[Tensor, "experts group"]:
    """Return the sorted members of each expert's group, padded with -1 to the size of the largest group."""
    count = len(same_group)
    members = torch.where(same_group, torch.arange(count), count).sort(1).values
    members = members[:, : int(same_group.sum(1).max()) if count else 0]
    return torch.where(members < count, members, -1)
