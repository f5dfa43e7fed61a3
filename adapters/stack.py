"""Stack: the banks of a composition, laid on one rank axis for each decoder layer, ready to be attached."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .bank import ExpertBank, LayerExperts
from .fused import ExpertGroup, FusedLinear, GateCell
from .gates import LayerGates

SAME_INPUT = (
    {"q_proj", "k_proj", "v_proj"},
    {"gate_proj", "up_proj"},
    {"query", "key", "value"},
    {"w1", "w3"},
)  # last parts of module paths


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Banks by slot; slot 0 is the KP bank. The last bank may be trainable.

    One bank more than names: the last bank is a new generation of experts of the last slot, beside those it has.
    """

    names: tuple[str, ...]
    banks: tuple[ExpertBank, ...]
    trainable: bool = False  # the last bank's tensors become parameters
    static: bool = False  # expert and rank gates are their measured means

    def __post_init__(self) -> None:
        if len(self.banks) - len(self.names) not in (0, 1):
            raise ValueError(f"{len(self.banks)} banks for {len(self.names)} slots")

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers that carry experts."""
        return tuple(sorted({index for bank in self.banks for index in bank.layers}))


@dataclass(frozen=True, kw_only=True)
class _Slice:
    """One bank's experts in one layer, with its slot."""

    slot: int
    experts: LayerExperts
    is_new: bool


def layer_slices(stack: Stack, index: int) -> list[_Slice]:
    """The banks that carry experts in this layer, in slot order; the trainable one, if any, is last."""
    last = len(stack.banks) - 1
    return [
        _Slice(slot=min(i, len(stack.names) - 1), experts=bank.layers[index], is_new=stack.trainable and i == last)
        for i, bank in enumerate(stack.banks)
        if index in bank.layers
    ]


def build_gates(slices: Sequence[_Slice], *, static: bool) -> LayerGates:
    """The gates of one layer."""
    frozen = [s.experts for s in slices if not s.is_new]
    new = next((s.experts for s in slices if s.is_new), None)
    width = slices[0].experts.expert_gate.shape[1]
    groups, experts, offset = [], [], 0  # a group: slot and generation
    for part in slices:
        groups += [(part.slot, expert.generation) for expert in part.experts.experts]
        experts.append(part.experts.expert_of_rank() + offset)
        offset += len(part.experts.experts)
    return LayerGates(
        expert_gate=torch.cat([torch.zeros(0, width), *(e.expert_gate.float() for e in frozen)]),
        rank_gate=torch.cat([torch.zeros(0, width), *(e.rank_rows().float() for e in frozen)]),
        new_expert_gate=None if new is None else new.expert_gate.float().clone(),
        new_rank_gate=None if new is None or new.rank_gate is None else new.rank_gate.float().clone(),
        slot_of_expert=torch.tensor([slot for slot, _ in groups]),
        group_of_expert=torch.tensor([groups.index(group) for group in groups]),
        expert_of_rank=torch.cat(experts),
        fixed_gate=torch.cat([s.experts.static_gate().float() for s in slices]) if static else None,
    )


def build_group(
    bases: Mapping[str, nn.Module], slices: Sequence[_Slice], cell: GateCell, dtype: torch.dtype
) -> tuple[ExpertGroup, dict[str, FusedLinear]] | None:
    """The experts of targets that read the same input, and their fused modules; None if no expert extends any."""
    having = {target: [s for s in slices if target in s.experts.A] for target in bases}
    targets = [target for target, parts in having.items() if parts]
    if not targets:
        return None
    fused, A, Bt, columns = {}, [], [], []
    for target in targets:
        frozen = [s.experts for s in having[target] if not s.is_new]
        new = next((s.experts for s in having[target] if s.is_new), None)
        sample = having[target][0].experts
        d_in, d_out = sample.A[target].shape[1], sample.B[target].shape[0]
        A.append(torch.cat([torch.zeros(0, d_in), *(e.A[target].float() for e in frozen)]).to(dtype))
        scaled = torch.cat([torch.zeros(d_out, 0), *(_scaled(e, target) for e in frozen)], dim=1)
        Bt.append(scaled.t().contiguous().to(dtype))
        columns.append(_ranks_of(slices, having[target]))
        fused[target] = FusedLinear(
            bases[target],
            new_A=None if new is None else new.A[target].float().clone(),
            new_B=None if new is None else new.B[target].float().clone(),
            new_scale=None if new is None else new.scales(),
        )
    has_all = all(len(having[target]) == len(slices) for target in targets)
    group = ExpertGroup(
        list(fused.values()),
        cell,
        A=A,
        Bt=Bt,
        columns=None if has_all else torch.cat(columns),
        slot_of_rank=[part.slot for part in slices for _ in range(part.experts.rank)],
    )
    return group, fused


def same_input_groups(targets: Iterable[str]) -> list[list[str]]:
    """Targets that are likely to read the same tensor together, by the names that model families give them.

    It is a guess about speed only: a fused module computes alone whenever it is called with another tensor.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    for target in targets:
        parent, _, name = target.rpartition(".")
        kind = next((i for i, names in enumerate(SAME_INPUT) if name in names), None)
        groups.setdefault((parent, kind) if kind is not None else (target, -1), []).append(target)
    return list(groups.values())


def _scaled(experts: LayerExperts, target: str) -> Float[Tensor, "d_out rank"]:
    """B with each expert's scale folded in, once, in float32."""
    return experts.B[target].float() * experts.scales()


def _ranks_of(slices: Sequence[_Slice], having: Sequence[_Slice]) -> Int[Tensor, " rank"]:
    """Which of the layer's ranks belong to the slices that extend this target."""
    chosen, offset = [], 0
    for part in slices:
        if any(part is other for other in having):
            chosen.append(torch.arange(offset, offset + part.experts.rank))
        offset += part.experts.rank
    return torch.cat(chosen)
