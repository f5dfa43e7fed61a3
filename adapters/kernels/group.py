"""GroupWeights: experts of target modules that read the same input, laid out for few, large matrix products.

    low = x A^T               A of all modules stacked: one product for the whole group
    y_m += (g * low_m) Bt_m   for each module m, accumulated in place on the output of the base module

The low-rank activation `low` has one column per row of A, in the order [module][rank]. Every implementation provides
the functions of `Kernels`. Those for groups take flat (tokens, features) tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor

from .gate_tables import GateTables

Linears = Sequence[tuple[Tensor, Tensor | None]]  # weight (d_out, d_in) and bias of each base module


@dataclass(kw_only=True)
class GroupWeights:
    """A and B of all experts, for the modules of one group."""

    A: Float[Tensor, "columns d_in"]
    Bt: tuple[Float[Tensor, "_ _"], ...]  # by module: (ranks, d_out), with scales folded in
    columns: Int[Tensor, " columns"] | None = None  # index of the gate; None: all, in order, for each module

    def __post_init__(self) -> None:
        # not a cached_property, which torch.compile does not trace
        self.transposed = self.A.t()  # a view, for the product with x
        self.ranks = [len(Bt) for Bt in self.Bt]  # columns of each module


@dataclass(frozen=True, kw_only=True)
class GroupGradients:
    """Result of the backward pass."""

    x: Float[Tensor, "tokens d_in"] | None  # through the experts only, in the dtype of x
    gates: Float[Tensor, "tokens rank"] | None  # float32
    A: tuple[Float[Tensor, "_ d_in"], ...]  # by module, of its trainable last ranks only
    Bt: tuple[Float[Tensor, "_ _"], ...]


class Kernels(Protocol):
    """Interface of an implementation."""

    def gates(
        self, hidden: Float[Tensor, "*tokens width"], slot_gate: Float[Tensor, "*#tokens slots"], tables: GateTables
    ) -> Float[Tensor, "*tokens rank"]:
        """Return the gates of a layer as float32, without gradients.

        Args:
            hidden: Input of the layer, of any floating dtype.
            slot_gate: Gates of all slots.
            tables: Tables of the selected slots; not those of a static composition.
        """
        ...

    def outputs(
        self,
        x: Float[Tensor, "tokens d_in"],
        linears: Linears,
        gates: Float[Tensor, "tokens rank"],
        weights: GroupWeights,
        *,
        keep: bool = False,
    ) -> tuple[list[Float[Tensor, "tokens _"]], Float[Tensor, "tokens columns"] | None]:
        """Return the outputs of linear base modules plus the experts' gated updates.

        Args:
            linears: The base modules, in the dtype of x.

        Returns:
            The outputs, newly allocated, and `low` if `keep`; see `update_`.
        """
        ...

    def update_(
        self,
        x: Float[Tensor, "tokens d_in"],
        outputs: Sequence[Float[Tensor, "tokens _"]],
        gates: Float[Tensor, "tokens rank"],
        weights: GroupWeights,
        *,
        keep: bool = False,
    ) -> Float[Tensor, "tokens columns"] | None:
        """Add the experts' gated updates to the outputs in place.

        Args:
            x: Input of the group, in the dtype of the outputs.
            outputs: Outputs of the base modules.
            gates: float32.
            weights: In the dtype of the outputs.
            keep: Whether to return `low`, for the backward pass.
        """
        ...

    def gradients(
        self,
        grad_outputs: Sequence[Float[Tensor, "tokens _"]],
        x: Float[Tensor, "tokens d_in"],
        low: Float[Tensor, "tokens columns"],
        gates: Float[Tensor, "tokens rank"],
        weights: GroupWeights,
        *,
        trainable: Sequence[int],
        needs_x_grad: bool,
        needs_gates_grad: bool,
    ) -> GroupGradients:
        """Compute the backward pass of `update_`; frozen experts cost no weight gradient.

        Args:
            trainable: Number of trainable ranks of each module, its last ones.
            needs_x_grad: Whether to compute the gradient of x; the caller adds that of the base modules.
            needs_gates_grad: Whether to compute the gradient of the gates.
        """
        ...
