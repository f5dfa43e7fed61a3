"""GateTables: weights and indices of one decoder layer's gates, laid out for one product with the hidden state.

    scores = (hidden rows^T) / |hidden|          of the E experts first, then of the ranks
    g[t, r] = slot_gate[t, slot(r)] * softmax(scores in group of expert(r))[expert(r)] * 2 sigmoid(scores[t, E + r])

The experts of one generation of one slot form a softmax group.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EPSILON = 1e-6  # lower bound of the norm that hidden states are divided by


@dataclass(kw_only=True)
class GateTables:
    """Gate weights and indices of the experts and ranks of some slots."""

    pieces: tuple[Float[Tensor, "_ width"], ...]  # rows of the experts, then of the ranks; float32
    same_group: Float[Tensor, "experts experts"]  # 1 where two experts share a softmax group, else 0
    slot_of_expert: Int[Tensor, " experts"]
    expert_of_rank: Int[Tensor, " rank"]
    slot_of_rank: Int[Tensor, " rank"]
    softmax_group_of_rank: Int[Tensor, "rank group"]  # experts in the group of each rank's expert, padded with -1
    fixed_gate: Float[Tensor, " rank"] | None  # constant expert gate * rank gate of a static composition
    ranks: list[int] = field(default_factory=list)  # of each run of slots, if these are only some

    def __post_init__(self) -> None:
        # not a cached_property, which torch.compile does not trace
        self.sizes = [len(self.slot_of_expert), len(self.expert_of_rank)]  # number of experts, number of ranks
        self.half_group = 0.5 * self.same_group

    @property
    def rows(self) -> Float[Tensor, "scores width"]:
        """All rows as one tensor: a copy, where these are only some slots'."""
        return self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces)

    def select_slots(self, runs: Sequence[tuple[int, int]]) -> "GateTables":
        """Return the same of some ranges of slots; softmaxes run inside a slot, so that none changes.

        Rows stay where they are: experts and ranks of neighbouring slots lie side by side.
        """
        device = self.same_group.device
        experts, ranks = _ranges(self.slot_of_expert, runs), _ranges(self.slot_of_rank, runs)
        of_experts = torch.cat([torch.arange(start, stop, device=device) for start, stop in experts])
        of_ranks = torch.cat([torch.arange(start, stop, device=device) for start, stop in ranks])
        new_place = self.slot_of_expert.new_zeros(len(self.slot_of_expert))
        new_place[of_experts] = torch.arange(len(of_experts), device=device)
        softmax_group = self.softmax_group_of_rank[of_ranks]
        rows, first = self.rows, len(self.slot_of_expert)
        pieces = [rows[start:stop] for start, stop in experts]
        pieces += [rows[first + start : first + stop] for start, stop in ranks]
        return GateTables(
            pieces=tuple(pieces) if self.fixed_gate is None else self.pieces,
            same_group=self.same_group[of_experts][:, of_experts],
            slot_of_expert=self.slot_of_expert[of_experts],
            expert_of_rank=new_place[self.expert_of_rank[of_ranks]],
            slot_of_rank=self.slot_of_rank[of_ranks],
            softmax_group_of_rank=torch.where(softmax_group >= 0, new_place[softmax_group.clamp(min=0)], -1),
            fixed_gate=None if self.fixed_gate is None else self.fixed_gate[of_ranks],
            ranks=[stop - start for start, stop in ranks],
        )


def _ranges(slots: Int[Tensor, " places"], runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return where each run begins and ends among places whose slots are in order."""
    known = slots.tolist()
    return [(bisect_left(known, start), bisect_left(known, stop)) for start, stop in runs]


def group_members(same_group: Bool[Tensor, "experts experts"]) -> Int[Tensor, "experts group"]:
    """Return the sorted members of each expert's group, padded with -1 to the size of the largest group."""
    count = len(same_group)
    members = torch.where(same_group, torch.arange(count), count).sort(1).values
    members = members[:, : int(same_group.sum(1).max()) if count else 0]
    return torch.where(members < count, members, -1)
