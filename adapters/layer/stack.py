"""Stack: the banks of a composition, stacked along one rank axis for each decoder layer."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..bank import ExpertBank, LayerExperts
from .fused import ExpertGroup, FusedLinear
from .gates import LayerGates
from .stacked import StackedComposition, StackedGroup, StackedLayer

SAME_INPUT = (
    {"q_proj", "k_proj", "v_proj"},
    {"gate_proj", "up_proj"},
    {"query", "key", "value"},
    {"w1", "w3"},
    {"q_a_proj", "kv_a_proj_with_mqa"},
    {"in_proj_qkvz", "in_proj_ba"},
)  # last parts of module paths


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Banks by slot; slot 0 is the KP bank. The last bank may be trainable.

    With one bank more than names, the last bank is an additional generation of experts of the last slot.
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

    def layer(self, index: int, dtype: torch.dtype) -> StackedLayer:
        """Return the stacked tensors of one decoder layer in `dtype`, that of the base model."""
        slices = layer_slices(self, index)
        widths = {target: A.shape[1] for part in slices for target, A in part.experts.A.items()}
        return StackedLayer(
            groups=tuple(stack_group(names, slices, dtype) for names in same_input_groups(widths)),
            slot_of_rank=tuple(part.slot for part in slices for _ in range(part.experts.rank)),
            gates=stack_gates(slices, static=self.static),
            new=next((part.experts for part in slices if part.is_new), None),
        )

    def stacked(self, dtype: torch.dtype) -> StackedComposition:
        """Return all layers in a form that can be saved.

        Raises:
            ValueError: If the last bank is trainable.
        """
        if self.trainable:
            raise ValueError("a composition that trains is not kept")
        layers = {index: self.layer(index, dtype) for index in self.layers}
        return StackedComposition(names=self.names, static=self.static, stacked=layers)


@dataclass(frozen=True, kw_only=True)
class _Slice:
    """One bank's experts in one layer, with its slot."""

    slot: int
    experts: LayerExperts
    is_new: bool


def layer_slices(stack: Stack, index: int) -> list[_Slice]:
    """Return the banks with experts in this layer, in slot order; a trainable one is last."""
    last = len(stack.banks) - 1
    return [
        _Slice(slot=min(i, len(stack.names) - 1), experts=bank.layers[index], is_new=stack.trainable and i == last)
        for i, bank in enumerate(stack.banks)
        if index in bank.layers
    ]


def stack_gates(slices: Sequence[_Slice], *, static: bool) -> dict[str, Tensor]:
    """Return the frozen part of the gates of one layer as keyword arguments of LayerGates."""
    frozen = [s.experts for s in slices if not s.is_new]
    width = slices[0].experts.expert_gate.shape[1]
    groups, experts, offset = [], [], 0  # a group: slot and generation
    for part in slices:
        groups += [(part.slot, expert.generation) for expert in part.experts.experts]
        experts.append(part.experts.expert_of_rank() + offset)
        offset += len(part.experts.experts)
    gates = {
        "expert_gate": torch.cat([torch.zeros(0, width), *(e.expert_gate.float() for e in frozen)]),
        "rank_gate": torch.cat([torch.zeros(0, width), *(e.rank_rows().float() for e in frozen)]),
        "slot_of_expert": torch.tensor([slot for slot, _ in groups]),
        "group_of_expert": torch.tensor([groups.index(group) for group in groups]),
        "expert_of_rank": torch.cat(experts),
    }
    return gates | ({"fixed_gate": torch.cat([s.experts.static_gate().float() for s in slices])} if static else {})


def stack_group(targets: Sequence[str], slices: Sequence[_Slice], dtype: torch.dtype) -> StackedGroup:
    """Return the frozen experts of targets that read the same input; each target needs at least one slice."""
    A, Bt, columns, ranks = [], [], [], []
    having = {target: [s for s in slices if target in s.experts.A] for target in targets}
    for target, parts in having.items():
        frozen, sample = [s.experts for s in parts if not s.is_new], parts[0].experts
        d_in, d_out = sample.A[target].shape[1], sample.B[target].shape[0]
        A += [torch.zeros(0, d_in), *(e.A[target].float() for e in frozen)]
        scaled = torch.cat([torch.zeros(d_out, 0), *(_scaled(e, target) for e in frozen)], dim=1)
        Bt.append(scaled.t().contiguous().to(dtype))
        columns.append(_ranks_of(slices, parts))
        ranks.append(sum(e.rank for e in frozen))
    has_all = all(len(parts) == len(slices) for parts in having.values())
    return StackedGroup(
        targets=tuple(targets),
        ranks=tuple(ranks),
        A=torch.cat(A).to(dtype),
        Bt=tuple(Bt),
        columns=None if has_all else torch.cat(columns),
    )


def build_gates(stacked: StackedLayer) -> LayerGates:
    """Build the gates of one layer."""
    new = stacked.new
    return LayerGates(
        **stacked.gates,
        new_expert_gate=None if new is None else new.expert_gate.float().clone(),
        new_rank_gate=None if new is None or new.rank_gate is None else new.rank_gate.float().clone(),
    )


def build_group(
    bases: Mapping[str, nn.Module], stacked: StackedLayer, group: StackedGroup, layer: Hashable
) -> tuple[ExpertGroup, dict[str, FusedLinear]]:
    """Build the fused modules of one group over `bases`; `layer` is the key of their gates (fused.py)."""
    fused = {}
    for target in group.targets:
        new = stacked.new if stacked.new is not None and target in stacked.new.A else None
        fused[target] = FusedLinear(
            bases[target],
            new_A=None if new is None else new.A[target].float().clone(),
            new_B=None if new is None else new.B[target].float().clone(),
            new_scale=None if new is None else new.scales(),
        )
    experts = ExpertGroup(
        list(fused.values()),
        layer,
        A=group.A,
        ranks=group.ranks,
        Bt=group.Bt,
        columns=group.columns,
        slot_of_rank=stacked.slot_of_rank,
        names=group.targets,
    )
    return experts, fused


def same_input_groups(widths: Mapping[str, int]) -> list[list[str]]:
    """Group targets that are likely to read the same tensor: of one parent and width, named as in common families.

    A wrong guess costs speed only: a fused module called with another tensor computes its output alone.

    Args:
        widths: Input width of each target.
    """
    groups: dict[tuple[str, int, int], list[str]] = {}
    for target, width in widths.items():
        parent, _, name = target.rpartition(".")
        kind = next((i for i, names in enumerate(SAME_INPUT) if name in names), None)
        groups.setdefault((parent, kind, width) if kind is not None else (target, -1, width), []).append(target)
    return list(groups.values())


def _scaled(experts: LayerExperts, target: str) -> Float[Tensor, "d_out rank"]:
    """Return B with each expert's scale folded in, in float32."""
    return experts.B[target].float() * experts.scales()


def _ranks_of(slices: Sequence[_Slice], having: Sequence[_Slice]) -> Int[Tensor, " rank"]:
    """Return the indices of the layer's ranks that belong to the slices with this target."""
    chosen, offset = [], 0
    for part in slices:
        if any(part is other for other in having):
            chosen.append(torch.arange(offset, offset + part.experts.rank))
        offset += part.experts.rank
    return torch.cat(chosen)
