"""LayerGates: gates of one decoder layer, computed from its input and shared by its target modules.

    g[token, rank] = slot_gate[token, slot] * expert_gate[token, expert] * rank_gate[token, rank]

The slot gate comes from the domain router. The expert gate routes inside a bank: a softmax of cos(h, W_e) / temperature
over the experts of one generation, so that adding a generation does not change the gates of older ones. The rank gate
is 2 sigmoid(V h), with h scaled to unit root mean square; it is 1 at initialization (V = 0). Arithmetic is float32.
Expert scores are bounded by 1 / temperature because they are cosines.

All scores of a layer are one matrix product with the unnormalized hidden state. The norm is divided out of the scores,
which are fewer than the features, and all constant factors are folded into the rows.
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
MAX_OPEN = 16  # sets of open slots whose tables a layer caches; tables are small, because rows are views


class LayerGates(nn.Module):
    """Gates of one decoder layer for a stack of banks; a trainable bank, if any, is the last."""

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
        """Build the gates of one layer.

        Args:
            expert_gate: Rows that score the frozen experts.
            rank_gate: Rows of the frozen ranks; zeros where a bank has no rank gates.
            new_expert_gate: Trainable rows of the new bank's experts, or None.
            new_rank_gate: Trainable rows of the new bank's ranks; None for a new bank with rank gates of 1.
            slot_of_expert: Slot of each expert, frozen ones first.
            group_of_expert: Softmax group of each expert: one number for each generation of each slot.
            expert_of_rank: Expert of each rank.
            fixed_gate: Constant product of expert gate and rank gate of each rank, for a static composition.
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
        self._whole: GateTables | None = None  # derived from the buffers, as is _open
        self._open: dict[Runs, GateTables] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Exclude derived state from copies."""
        return self.__dict__ | {"_whole": None, "_open": {}}

    def _apply(self, fn: Callable, recurse: bool = True) -> "LayerGates":
        """Move the buffers, which stay float32, and drop what was derived from them."""
        self._whole, self._open = None, {}
        return super()._apply(device_only(fn), recurse)

    def forward(
        self,
        hidden: Float[Tensor, "*tokens width"],
        slot_gate: Float[Tensor, "*#tokens slots"],
        runs: Runs | None = None,
    ) -> Float[Tensor, "*tokens rank"]:
        """Return the product of slot, expert and rank gates for every token.

        Args:
            hidden: Input of the layer.
            slot_gate: Gates of all slots.
            runs: Slots to compute gates for, on a correspondingly shorter rank axis; None: all.
        """
        return self.with_use(hidden, slot_gate, runs)[0]

    def with_use(
        self,
        hidden: Float[Tensor, "*tokens width"],
        slot_gate: Float[Tensor, "*#tokens slots"],
        runs: Runs | None = None,
    ) -> tuple[Float[Tensor, "*tokens rank"], Float[Tensor, "*tokens new"] | None]:
        """Return the gates as `forward` does and, while a bank trains, the expert gates of its experts."""
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
        """Return the gates of a static composition under constant slot gates."""
        assert self.fixed_gate is not None
        return slot_gate.to(self.fixed_gate.device)[self.slot_of_rank] * self.fixed_gate

    def ranks(self, runs: Runs) -> list[int]:
        """Return the number of ranks of each run of slots."""
        return self._tables(runs).ranks

    def _tables(self, runs: Runs | None) -> GateTables:
        """Return the tables of some slots, cached unless a bank trains."""
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
            # replaced, not mutated: other threads may be reading it
            self._open = dict(list(self._open.items())[1 - MAX_OPEN :]) | {runs: found}
        return found

    def tables(self, new_experts: Tensor | None = None, new_ranks: Tensor | None = None) -> GateTables:
        """Return the tables of all slots.

        Args:
            new_experts: Rows of a trainable bank's experts; None: those of `new_rows`.
            new_ranks: Rows of a trainable bank's ranks.
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
        """Return the rows of a trainable bank's experts and ranks; None where there are none."""
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


def device_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a conversion of `Module._apply` without its change of dtype."""

    def move(tensor: Tensor) -> Tensor:
        found = fn(tensor)
        return found if found.dtype == tensor.dtype else tensor.to(found.device)

    return move


def _expert_rows(gate: Float[Tensor, "experts width"]) -> Float[Tensor, "experts width"]:
    """Return rows whose product with a unit vector is the cosine divided by the temperature."""
    return F.normalize(gate, dim=-1, eps=EPSILON) / TEMPERATURE


def _rank_rows(gate: Float[Tensor, "rank width"]) -> Float[Tensor, "rank width"]:
    """Return rows scaled so that a unit vector scores as if it had unit root mean square."""
    return gate * gate.shape[-1] ** 0.5
