"""LayerGates: the gates of one decoder layer, computed from its input and shared by its target modules.

    g[token, rank] = slot_gate[token, slot] * expert_gate[token, expert] * rank_gate[token, rank]

The slot gate comes from the domain router. The expert gate is adaptive routing inside a bank: softmax over the experts
of one generation of cos(h, W_e) / temperature, so that a generation that is added later leaves the older ones' gates as
they are. The rank gate is rank-wise decoupling: 2 sigmoid(V h),
which is 1 at the start (V = 0), so that each rank is a unit that text can claim or leave. Arithmetic is float32; scores
are bounded by 1 / temperature because both sides are unit vectors.

All scores of a layer are one matrix product with the hidden state as it is; its length is divided out of the few
scores, not of the wide hidden state, and all constant factors are in the rows.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..kernels.dispatch import choose_kernels
from ..kernels.gate_tables import EPSILON, GateTables, group_members
from .active import Runs
from .gate_update import GateUpdate

TEMPERATURE = 0.1  # of the expert gates; scores are cosines, so |score| <= 10
MAX_OPEN = 16  # sets of open slots whose tables a layer keeps; small, because rows are not copied


class LayerGates(nn.Module):
    """All gates of one decoder layer for a stack of banks; a trainable bank, if any, is the last."""

    rows: Tensor
    slot_of_expert: Tensor
    expert_of_rank: Tensor
    same_group: Tensor
    slot_of_rank: Tensor
    softmax_group_of_rank: Tensor
    fixed_gate: Tensor | None

    def __init__(
        self,
        *,
        expert_gate: Float[Tensor, "frozen width"],
        rank_gate: Float[Tensor, "frozen_rank width"],
        new_expert_gate: Float[Tensor, "new width"] | None,
        new_rank_gate: Float[Tensor, "new_rank width"] | None,
        slot_of_expert: Int[Tensor, " experts"],
        group_of_expert: Int[Tensor, " experts"],
        expert_of_rank: Int[Tensor, " rank"],
        fixed_gate: Float[Tensor, " rank"] | None = None,
    ):
        """Builds the gates of one layer.

        Args:
            expert_gate: Rows that score the frozen experts.
            rank_gate: Rows of the frozen ranks; zeros where a bank has no rank gates.
            new_expert_gate: Trainable rows of the new bank's experts, or None.
            new_rank_gate: Trainable rows of the new bank's ranks; None with a new bank means factors of 1.
            slot_of_expert: Each expert's slot, frozen ones first.
            group_of_expert: Equal for experts of one generation of one slot, which share a softmax.
            expert_of_rank: Each rank's expert.
            fixed_gate: Constant expert gate times rank gate of each rank, for a static composition.
        """
        super().__init__()
        rows = torch.cat([_expert_rows(expert_gate.float()), _rank_rows(rank_gate.float())])
        self.register_buffer("rows", rows, persistent=False)
        self.frozen_experts = len(expert_gate)
        self.register_buffer("slot_of_expert", slot_of_expert, persistent=False)
        self.register_buffer("expert_of_rank", expert_of_rank, persistent=False)
        self.register_buffer("fixed_gate", fixed_gate, persistent=False)
        same_group = group_of_expert[:, None] == group_of_expert[None, :]
        self.register_buffer("same_group", same_group.float(), persistent=False)
        self.register_buffer("slot_of_rank", slot_of_expert[expert_of_rank], persistent=False)
        self.register_buffer("softmax_group_of_rank", group_members(same_group)[expert_of_rank], persistent=False)
        self.new_expert_gate = None if new_expert_gate is None else nn.Parameter(new_expert_gate)
        self.new_rank_gate = None if new_rank_gate is None else nn.Parameter(new_rank_gate)
        self._whole: GateTables | None = None  # derived from the buffers, like those by runs
        self._open: dict[Runs, GateTables] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of a copy what is derived: the copy derives its own."""
        return self.__dict__ | {"_whole": None, "_open": {}}

    def _apply(self, fn: Callable, recurse: bool = True) -> "LayerGates":
        """Move or cast the buffers; what was derived from them is derived anew."""
        self._whole, self._open = None, {}
        return super()._apply(fn, recurse)

    def forward(
        self,
        hidden: Float[Tensor, "*tokens width"],
        slot_gate: Float[Tensor, "*#tokens slots"],
        runs: Runs | None = None,
    ) -> Float[Tensor, "*tokens rank"]:
        """Return the product of slot, expert and rank gates for every token.

        Args:
            hidden: What enters the layer.
            slot_gate: Of all slots.
            runs: The only slots whose gates are wanted, on a shorter rank axis; None: all.
        """
        return self.with_use(hidden, slot_gate, runs)[0]

    def with_use(
        self,
        hidden: Float[Tensor, "*tokens width"],
        slot_gate: Float[Tensor, "*#tokens slots"],
        runs: Runs | None = None,
    ) -> tuple[Float[Tensor, "*tokens rank"], Float[Tensor, "*tokens new"] | None]:
        """Return the same and, while a bank trains, the expert gates of its experts."""
        needs_gradient = hidden.requires_grad or slot_gate.requires_grad or self.new_expert_gate is not None
        if needs_gradient and torch.is_grad_enabled() and self.fixed_gate is None:
            assert runs is None
            gates, use = GateUpdate.apply(self, hidden, slot_gate, *self.new_rows())  # type: ignore[misc]
            return gates, use if self.training and self.new_expert_gate is not None else None
        tables = self._tables(runs)
        if tables.fixed_gate is not None:
            by_rank = slot_gate.index_select(-1, tables.slot_of_rank) * tables.fixed_gate
            return by_rank.expand(*hidden.shape[:-1], -1), None
        return choose_kernels(hidden.device).gates(hidden, slot_gate, tables), None

    def constant_gate(self, slot_gate: Float[Tensor, " slots"]) -> Float[Tensor, " rank"]:
        """The gates of a static composition under constant slot gates."""
        assert self.fixed_gate is not None
        return slot_gate.to(self.fixed_gate.device)[self.slot_of_rank] * self.fixed_gate

    def ranks(self, runs: Runs) -> list[int]:
        """Return how many ranks each run of slots has."""
        return self._tables(runs).ranks

    def _tables(self, runs: Runs | None) -> GateTables:
        """Return what the gates of some slots are computed from; kept, unless a part of it trains."""
        if self.new_expert_gate is not None:
            assert runs is None
            return self.tables()
        if self._whole is None:
            self._whole = self.tables()
        if runs is None:
            return self._whole
        found = self._open.get(runs)
        if found is None:
            found = self._whole.select_slots(runs)
            # replaced, not changed: other threads may be reading it
            self._open = dict(list(self._open.items())[1 - MAX_OPEN :]) | {runs: found}
        return found

    def tables(self, new_experts: Tensor | None = None, new_ranks: Tensor | None = None) -> GateTables:
        """Return what the gates of all slots are computed from.

        Args:
            new_experts: Rows of a trainable bank's experts; None: those of `new_rows`.
            new_ranks: Rows of its ranks.
        """
        return GateTables(
            pieces=(self._all_rows(new_experts, new_ranks),),
            same_group=self.same_group,
            slot_of_expert=self.slot_of_expert,
            expert_of_rank=self.expert_of_rank,
            slot_of_rank=self.slot_of_rank,
            softmax_group_of_rank=self.softmax_group_of_rank,
            fixed_gate=self.fixed_gate,
        )

    def new_rows(self) -> tuple[Float[Tensor, "new width"] | None, Float[Tensor, "new_rank width"] | None]:
        """The rows of a trainable bank's experts and ranks; None where there are none."""
        return (
            None if self.new_expert_gate is None else _expert_rows(self.new_expert_gate),
            None if self.new_rank_gate is None else _rank_rows(self.new_rank_gate),
        )

    def _all_rows(self, new_experts: Tensor | None, new_ranks: Tensor | None) -> Float[Tensor, "scores width"]:
        if self.new_expert_gate is None:
            return self.rows
        if new_experts is None:
            new_experts, new_ranks = self.new_rows()
            assert new_experts is not None
        frozen = self.rows[: self.frozen_experts], self.rows[self.frozen_experts :]
        if new_ranks is None:
            missing = len(self.slot_of_expert) + len(self.expert_of_rank) - len(self.rows) - len(new_experts)
            new_ranks = self.rows.new_zeros(missing, self.rows.shape[1])
        return torch.cat([frozen[0], new_experts, frozen[1], new_ranks])


def _expert_rows(gate: Float[Tensor, "experts width"]) -> Float[Tensor, "experts width"]:
    """Rows whose product with a unit vector is the cosine over the temperature."""
    return F.normalize(gate, dim=-1, eps=EPSILON) / TEMPERATURE


def _rank_rows(gate: Float[Tensor, "rank width"]) -> Float[Tensor, "rank width"]:
    """Rows whose product with a unit vector is that with the vector of unit root mean square."""
    return gate * gate.shape[-1] ** 0.5
