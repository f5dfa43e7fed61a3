"""ExpertBank: all experts of one domain version with their gates, as plain tensors.

The experts of a layer share one rank axis: for each target module A is (rank, d_in) and B is (d_out, rank), where
`rank` is the sum of the experts' ranks. B is stored as trained; scales are folded in when a stack is built.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..domains.base_model import ModelLayout
from ..domains.linear import linear_shape
from ..domains.target_modules import Targets, find_targets
from .allocation import allocate
from .config import BankConfig, lora_scale


@dataclass(frozen=True, kw_only=True)
class Expert:
    """Metadata of one expert."""

    id: str
    rank: int
    alpha: float
    method: str = "lora"
    generation: int = 0  # experts added together, which form one softmax group in each layer

    @property
    def scale(self) -> float:
        """Factor of B A x in the expert's update."""
        return lora_scale(self.alpha, self.rank, self.method)


@dataclass
class LayerExperts:
    """Experts of one bank in one decoder layer."""

    experts: tuple[Expert, ...]
    A: dict[str, Float[Tensor, "rank d_in"]]  # by module path relative to the layer
    B: dict[str, Float[Tensor, "d_out rank"]]
    expert_gate: Float[Tensor, "experts width"]  # W_e: its rows score the experts
    rank_gate: Float[Tensor, "rank width"] | None  # V; None: no rank gates (all factors 1)
    mean_gate: Float[Tensor, " rank"] | None = None  # mean of expert gate * rank gate on the training text

    @property
    def rank(self) -> int:
        """Length of the layer's rank axis."""
        return sum(expert.rank for expert in self.experts)

    def select_expert(self, expert: Expert) -> "LayerExperts":
        """Return views of one expert's matrices, without gates; see `ExpertBank.select_expert`."""
        start = sum(other.rank for other in self.experts[: self.experts.index(expert)])
        part = slice(start, start + expert.rank)
        # A and B are both zero for a target that only other experts of the layer extend
        own = [target for target in self.A if self.A[target][part].any() or self.B[target][:, part].any()]
        return LayerExperts(
            experts=(expert,),
            A={target: self.A[target][part] for target in own},
            B={target: self.B[target][:, part] for target in own},
            expert_gate=self.expert_gate[:0],
            rank_gate=None,
        )

    def scales(self) -> Float[Tensor, " rank"]:
        """Return the scale of each rank."""
        return torch.cat([torch.full((expert.rank,), expert.scale) for expert in self.experts])

    def expert_of_rank(self) -> Int[Tensor, " rank"]:
        """Return the index of each rank's expert in the layer."""
        ranks = torch.tensor([expert.rank for expert in self.experts])
        return torch.repeat_interleave(torch.arange(len(self.experts)), ranks)

    def rank_rows(self) -> Float[Tensor, "rank width"]:
        """Return V, or zeros (factors of 1) if there are no rank gates."""
        return torch.zeros(self.rank, self.expert_gate.shape[1]) if self.rank_gate is None else self.rank_gate

    def static_gate(self) -> Float[Tensor, " rank"]:
        """Return the constant gates of a static composition: the measured means, else 1 / number of experts."""
        if self.mean_gate is not None:
            return self.mean_gate
        return torch.full((self.rank,), 1.0 / len(self.experts))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors with stable names, for digests."""
        for target in sorted(self.A):
            yield f"{target}.A", self.A[target]
            yield f"{target}.B", self.B[target]
        yield "expert_gate", self.expert_gate
        if self.rank_gate is not None:
            yield "rank_gate", self.rank_gate
        if self.mean_gate is not None:
            yield "mean_gate", self.mean_gate


@dataclass
class ExpertBank:
    """Experts of one domain version by decoder layer; layers without experts are absent."""

    layers: dict[int, LayerExperts] = field(default_factory=dict)

    @property
    def experts(self) -> tuple[Expert, ...]:
        """All experts, sorted by generation, then by first layer."""
        found = dict.fromkeys(expert for _, layer in sorted(self.layers.items()) for expert in layer.experts)
        return tuple(sorted(found, key=lambda expert: expert.generation))

    @property
    def first_layer(self) -> int:
        """Index of the first decoder layer with experts."""
        return min(self.layers)

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(tensor.numel() for name, tensor in self.tensors() if not name.endswith("mean_gate"))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors with stable names in a stable order."""
        for index, layer in sorted(self.layers.items()):
            for name, tensor in layer.tensors():
                yield f"layers.{index}.{name}", tensor

    def select_expert(self, expert: Expert) -> "ExpertBank":
        """Return one expert's matrices without gates; targets that it does not extend are absent."""
        return ExpertBank(
            {i: layer.select_expert(expert) for i, layer in self.layers.items() if expert in layer.experts}
        )

    def counts(self, depth: int) -> tuple[int, ...]:
        """Return the number of experts of each of `depth` decoder layers."""
        return tuple(len(self.layers[i].experts) if i in self.layers else 0 for i in range(depth))


def new_bank(
    model: PreTrainedModel,
    layout: ModelLayout,
    config: BankConfig,
    *,
    generator: torch.Generator,
    weights: list[float] | None = None,
    older: Sequence[Expert] = (),
    targets: Targets | None = None,
) -> ExpertBank:
    """Return an untrained bank without effect: A Kaiming uniform as in Hu et al. 2021, B and rank gates zero.

    Each layer extends the targets that it has; a layer without any gets no experts.

    Args:
        weights: Weights of the layers with experts, for schedule `data` only.
        older: Experts of the bank to extend; new ids continue theirs and the generation is the next one.
        targets: The model's targets; None: found by two short forward passes.
    """
    chosen = (targets or find_targets(model, layout)).choose(config.targets)
    counts = allocate(
        layout.count,
        experts=config.experts,
        schedule=config.schedule,
        expert_free=config.expert_free,
        weights=weights,
        without=[index for index, paths in enumerate(chosen) if not paths],
    )
    bank = ExpertBank()
    for index, count in enumerate(counts):
        if count:
            layer = model.get_submodule(f"{layout.layers}.{index}")
            experts = _new_experts(count, config, older)
            bank.layers[index] = _new_layer(layer, chosen[index], experts, layout.width, config, generator)
    return bank


def concat_layers(first: LayerExperts, second: LayerExperts) -> LayerExperts:
    """Concatenate the experts of one layer along the rank axis; missing targets are filled with zeros."""
    parts, a_matrices, b_matrices = (first, second), {}, {}
    for target in dict.fromkeys([*first.A, *second.A]):
        sample = next(part for part in parts if target in part.A)
        d_in, d_out = sample.A[target].shape[1], sample.B[target].shape[0]
        a_matrices[target] = torch.cat(
            [part.A.get(target, sample.A[target].new_zeros(part.rank, d_in)) for part in parts]
        )
        b_matrices[target] = torch.cat(
            [part.B.get(target, sample.B[target].new_zeros(d_out, part.rank)) for part in parts], dim=1
        )
    rank_gate = mean_gate = None
    if first.rank_gate is not None or second.rank_gate is not None:
        rank_gate = torch.cat([part.rank_rows() for part in parts])
    if first.mean_gate is not None or second.mean_gate is not None:
        mean_gate = torch.cat([part.static_gate() for part in parts])
    return LayerExperts(
        experts=first.experts + second.experts,
        A=a_matrices,
        B=b_matrices,
        expert_gate=torch.cat([first.expert_gate, second.expert_gate]),
        rank_gate=rank_gate,
        mean_gate=mean_gate,
    )


def extend_bank(bank: ExpertBank, addition: ExpertBank) -> ExpertBank:
    """Return `bank` with a new generation of experts; the values of the older experts are unchanged."""
    layers = dict(bank.layers)
    for index, new in addition.layers.items():
        layers[index] = concat_layers(layers[index], new) if index in layers else new
    return ExpertBank(layers)


def _new_experts(count: int, config: BankConfig, older: Sequence[Expert]) -> tuple[Expert, ...]:
    generation = 1 + max((expert.generation for expert in older), default=-1)
    return tuple(
        Expert(
            id=f"e{len(older) + i}",
            rank=config.rank,
            alpha=config.alpha,
            method=config.method,
            generation=generation,
        )
        for i in range(count)
    )


def _new_layer(
    layer: nn.Module,
    targets: tuple[str, ...],
    experts: tuple[Expert, ...],
    width: int,
    config: BankConfig,
    generator: torch.Generator,
) -> LayerExperts:
    count = len(experts)
    rank = count * config.rank
    a_matrices, b_matrices = {}, {}
    for target in targets:
        d_in, d_out = linear_shape(layer.get_submodule(target))
        bound = d_in**-0.5
        a_matrices[target] = torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator)
        b_matrices[target] = torch.zeros(d_out, rank)
    return LayerExperts(
        experts=experts,
        A=a_matrices,
        B=b_matrices,
        expert_gate=torch.randn(count, width, generator=generator) * width**-0.5,
        rank_gate=torch.zeros(rank, width) if config.rank_gates else None,
    )
