"""FusedLinear: a frozen linear module and all experts of all slots that extend it; ExpertGroup: those of one input.

    y = W x + B (g * (A x))        A (rank, d_in)   B (d_out, rank)   g (tokens, rank)

All experts lie on one rank axis, so mixed ranks and any number of experts cost the same two products, and the gates act
on the small activation. A and B are never mixed before the product: that would add cross terms (B1 A2).

Modules that read the same tensor (q, k and v; gate and up) form a group, which has one A: whichever of them is called
first computes the outputs of all, and the others pick theirs up if they are called with that very tensor. The
arithmetic is in `kernels/`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from .kernels.dispatch import choose_kernels
from .kernels.group import GroupWeights


class GateCell:
    """Holds the gates of one decoder layer during a forward pass; shared by the layer's groups."""

    def __init__(self) -> None:
        self.gates: Tensor | None = None  # (batch, seq, rank), float32

    def __getstate__(self) -> dict[str, None]:
        """A copy starts empty: gates belong to a forward pass, and those of training cannot be copied."""
        return {"gates": None}


class FusedLinear(nn.Module):
    """A frozen linear module with experts, which its group computes; trainable ones are the last ranks."""

    new_scale: Tensor | None
    group: "ExpertGroup"

    def __init__(
        self,
        base: nn.Module,
        *,
        new_A: Float[Tensor, "new d_in"] | None = None,
        new_B: Float[Tensor, "d_out new"] | None = None,
        new_scale: Float[Tensor, " new"] | None = None,
    ):
        """Builds the module; nothing is copied from `base`.

        Args:
            new_A: Trainable experts' A, or None.
            new_B: Trainable experts' B, scale not folded in.
            new_scale: The scales of the trainable ranks.
        """
        super().__init__()
        self.base = base
        self.register_buffer("new_scale", new_scale, persistent=False)
        self.new_A = None if new_A is None else nn.Parameter(new_A)
        self.new_B = None if new_B is None else nn.Parameter(new_B)
        self.place = 0  # in its group

    def forward(self, x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "batch seq d_out"]:
        """The base module's output plus every expert's gated update."""
        return self.group.output(self.place, x)


class ExpertGroup(nn.Module):
    """The experts of the modules that read one input."""

    A: Tensor
    columns: Tensor | None

    def __init__(
        self,
        members: Sequence[FusedLinear],
        cell: GateCell,
        *,
        A: Sequence[Float[Tensor, "_ d_in"]],
        Bt: Sequence[Float[Tensor, "_ _"]],
        columns: Int[Tensor, " columns"] | None = None,
    ):
        """Builds the group and makes it that of its members.

        Args:
            members: The modules; all read the same input.
            cell: Where the gates of the decoder layer are.
            A: By member: the frozen experts' A, one under the other.
            Bt: By member: the frozen experts' B, transposed, scales folded in.
            columns: The gate of every column, trainable ones included; None if each member has all gates, in order.
        """
        super().__init__()
        self.cell = cell
        self.frozen_ranks = [len(part) for part in A]
        self.register_buffer("A", torch.cat(list(A)), persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        for place, part in enumerate(Bt):
            self.register_buffer(f"Bt{place}", part, persistent=False)
        # no submodules of the group: they have their places in the decoder layer
        object.__setattr__(self, "members", tuple(members))
        for place, member in enumerate(members):
            member.place = place
            object.__setattr__(member, "group", self)
        self.trainable = [0 if member.new_A is None else len(member.new_A) for member in members]
        self._waiting: _Waiting | None = None
        self._unclaimed = 0  # times in a row that nobody wanted what was computed for the others

    members: tuple[FusedLinear, ...]

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without the outputs of a forward pass."""
        return self.__dict__ | {"_waiting": None}

    def output(self, place: int, x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "batch seq d_out"]:
        """One member's output for x: computed now, together with the other members', or already waiting."""
        gates = self.cell.gates
        if gates is None:
            raise RuntimeError("FusedLinear ran outside the decoder layer that computes its gates.")
        waiting = self._waiting
        if waiting is not None and waiting.x is x and waiting.gates is gates:
            found = waiting.outputs.pop(place, None)
            if found is not None:
                self._unclaimed = 0
                if not waiting.outputs:
                    self._waiting = None
                return found
        if len(self.members) == 1:
            return self.outputs(x, gates, (0,))[0]
        return self._first_output(place, x, gates)

    def _first_output(self, place: int, x: Tensor, gates: Tensor) -> Tensor:
        """Computes for all members and lets the others' outputs wait; for one alone if they never want them."""
        if self._waiting is not None:
            self._unclaimed += 1
        self._waiting = None
        if self._unclaimed >= 2:  # these modules do not read the same tensor after all
            return self.outputs(x, gates, (place,))[0]
        outputs = dict(enumerate(self.outputs(x, gates, tuple(range(len(self.members))))))
        found = outputs.pop(place)
        self._waiting = _Waiting(x, gates, outputs)
        return found

    def outputs(self, x: Tensor, gates: Tensor, places: tuple[int, ...]) -> Sequence[Tensor]:
        """What these members give for x."""
        members = [self.members[place] for place in places]
        trained = [p for member in members for p in (member.new_A, member.new_B) if p is not None]
        if torch.is_grad_enabled() and (
            x.requires_grad or gates.requires_grad or any(p.requires_grad for p in trained)
        ):
            is_plain = all(type(member.base) is nn.Linear for member in members)
            if is_plain and not torch.is_autocast_enabled(x.device.type) and x.dtype == members[0].base.weight.dtype:
                outputs = [None] * len(members)  # computed inside, so that the gradient of x is summed in place
            else:
                outputs = [member.base(x) for member in members]
            return GroupUpdate.apply(self, places, x, gates, *outputs, *trained)
        outputs = [_owned_output(member.base, x) for member in members]
        dtype = outputs[0].dtype
        choose_kernels(x.device).update_(
            x.reshape(-1, x.shape[-1]).to(dtype),
            [output.view(-1, output.shape[-1]) for output in outputs],
            gates.reshape(-1, gates.shape[-1]),
            self.weights(places, dtype),
        )
        return outputs

    def weights(self, places: tuple[int, ...], dtype: torch.dtype) -> GroupWeights:
        """A and B of some members, trainable ranks included, in the type of the outputs."""
        is_whole = len(places) == len(self.members)
        columns = self.columns
        if not is_whole and columns is not None:
            sizes = [frozen + new for frozen, new in zip(self.frozen_ranks, self.trainable, strict=True)]
            columns = torch.cat([columns.split(sizes)[place] for place in places])
        if is_whole and not any(self.trainable):
            A = self.A
        else:
            frozen = self.A.split(self.frozen_ranks)
            parts = [(frozen[place], self.members[place].new_A) for place in places]
            A = torch.cat([rows.to(dtype) for pair in parts for rows in pair if rows is not None])
        Bt = []
        for place in places:
            member, rows = self.members[place], self.get_buffer(f"Bt{place}")
            if member.new_B is not None:
                assert member.new_scale is not None
                rows = torch.cat([rows.to(dtype), (member.new_B * member.new_scale).t().to(dtype)])
            Bt.append(rows.to(dtype))
        return GroupWeights(A=A.to(dtype), Bt=tuple(Bt), columns=columns)


class _Waiting:
    """Outputs that were computed for modules which have not been called yet."""

    def __init__(self, x: Tensor, gates: Tensor, outputs: dict[int, Tensor]):
        self.x = x
        self.gates = gates
        self.outputs = outputs


def _owned_output(base: nn.Module, x: Tensor) -> Tensor:
    """The base module's output in memory that may be written to: what another module returns may be kept by it."""
    output = base(x)
    if type(base) in (nn.Linear, Conv1D) and not base._forward_hooks:
        return output
    return output.clone(memory_format=torch.contiguous_format)


class GroupUpdate(torch.autograd.Function):
    """y_m + B_m (g * (A_m x)) with gradients for x, the outputs, the gates and the trainable experts only.

    Frozen experts get no weight gradient: no matrix product is spent on one. Only x and rank-sized activations are kept
    for the backward pass; the weights of frozen and trainable experts are put together again there.
    """

    @staticmethod
    def forward(ctx, group, places, x, gates, *rest):  # noqa: D102
        given, trained = rest[: len(places)], rest[len(places) :]
        members = [group.members[place] for place in places]
        ctx.is_inside = given[0] is None
        if ctx.is_inside:
            outputs = [nn.functional.linear(x, member.base.weight, member.base.bias) for member in members]
        else:
            outputs = [output.clone(memory_format=torch.contiguous_format) for output in given]
        dtype = outputs[0].dtype
        flat, gate = x.reshape(-1, x.shape[-1]).to(dtype), gates.reshape(-1, gates.shape[-1])
        low = choose_kernels(x.device).update_(
            flat,
            [output.view(-1, output.shape[-1]) for output in outputs],
            gate,
            group.weights(places, dtype),
            keep=True,
        )
        ctx.save_for_backward(flat, low, gate, *trained)
        ctx.group, ctx.places = group, places
        ctx.x_shape, ctx.x_type, ctx.gates_shape = x.shape, x.dtype, gates.shape
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        flat, low, gate, *trained = ctx.saved_tensors
        group, members = ctx.group, [ctx.group.members[place] for place in ctx.places]
        needs = ctx.needs_input_grad
        flat_grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_x = None
        if needs[2]:
            grad_x = _base_gradient(flat_grads, members) if ctx.is_inside else torch.zeros_like(flat)
        has_trained = any(needs[4 + len(members) :])
        found = choose_kernels(flat.device).gradients_(
            flat_grads,
            flat,
            low,
            gate,
            group.weights(ctx.places, flat.dtype),
            trainable=[group.trainable[place] if has_trained else 0 for place in ctx.places],
            grad_x=grad_x,
            wants_gates=needs[3],
        )
        grad_trained: list[Tensor | None] = []
        for member, grad_A, grad_Bt in zip(members, found.A, found.Bt, strict=True):
            if member.new_A is not None:
                grad_trained += (
                    [grad_A.float(), grad_Bt.t().float() * member.new_scale] if has_trained else [None, None]
                )
        return (
            None,
            None,
            None if grad_x is None else grad_x.to(ctx.x_type).view(ctx.x_shape),
            None if found.gates is None else found.gates.view(ctx.gates_shape),
            *(grads if not ctx.is_inside else [None] * len(members)),
            *grad_trained,
        )


def _base_gradient(grads: Sequence[Float[Tensor, "tokens _"]], members: Sequence[Any]) -> Float[Tensor, "tokens d_in"]:
    """The gradient that x gets through the frozen base modules."""
    total = torch.mm(grads[0], members[0].base.weight)
    for grad, member in zip(grads[1:], members[1:], strict=True):
        total.addmm_(grad, member.base.weight)
    return total
