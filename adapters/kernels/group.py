"""GroupWeights: the experts of target modules that read the same input, laid out for few and large matrix products.

    low = x A^T               A of all modules one under the other: one product for the whole group
    y_m += (g * low_m) Bt_m   for each module m, added in place to what the base module computed

`low` has one column for each row of A, in the order [module][rank]. Every implementation offers the functions of
`Kernels`. Those of groups work on flat (tokens, features) tensors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor

from .gate_tables import GateTables

Linears = Sequence[tuple[Tensor, Tensor | None]]  # weight (d_out, d_in) and bias of each module


@dataclass(kw_only=True)
class GroupWeights:
    """A and B of every expert, for all modules of one group."""

    A: Float[Tensor, "columns d_in"]
    Bt: tuple[Float[Tensor, "_ _"], ...]  # by module: (its ranks, its d_out), scales folded in
    columns: Int[Tensor, " columns"] | None = None  # which gate a column has; None: every module has all, in order

    def __post_init__(self) -> None:
        # once, not in every call; torch.compile does not follow a cached_property
        self.transposed = self.A.t()  # A as the product with x takes it, a view
        self.ranks = [len(Bt) for Bt in self.Bt]  # how many columns each module has


@dataclass(frozen=True, kw_only=True)
class GroupGradients:
    """What the backward pass finds."""

    x: Float[Tensor, "tokens d_in"] | None  # through the experts alone, in the type of x
    gates: Float[Tensor, "tokens rank"] | None  # float32
    A: tuple[Float[Tensor, "_ d_in"], ...]  # by module, of its last ranks only: those that train
    Bt: tuple[Float[Tensor, "_ _"], ...]


class Kernels(Protocol):
    """One implementation."""

    def gates(
        self, hidden: Float[Tensor, "*tokens width"], slot_gate: Float[Tensor, "*#tokens slots"], tables: GateTables
    ) -> Float[Tensor, "*tokens rank"]:
        """The gates of a layer, float32, without gradients.

        Args:
            hidden: What enters the layer, in any type.
            slot_gate: Of all slots.
            tables: Those of the slots that are wanted; not of a static composition.
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
        """What plain linear modules give with every expert's gated update, in whichever order is the fastest.

        Args:
            linears: The base modules, in the type of x.

        Returns:
            The outputs, in new memory, and `low`, if it is kept; see `update_`.
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
        """Adds every expert's gated update to the outputs, in place.

        Args:
            x: The input of the group, in the type of the outputs.
            outputs: What the base modules computed, one for each module.
            gates: float32.
            weights: In the type of the outputs.
            keep: Whether `low` is wanted for the backward pass.

        Returns:
            `low`, if it is kept.
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
        wants_x: bool,
        wants_gates: bool,
    ) -> GroupGradients:
        """The backward pass of `update_`; frozen experts cost no weight gradient.

        Args:
            trainable: How many of each module's last ranks train.
            wants_x: Whether the gradient of x is wanted. The base modules' part of it is added by the caller.
            wants_gates: Whether the gradient of the gates is wanted.
        """
        ...
