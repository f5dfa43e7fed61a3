"""FusedLinear: a frozen linear module and all experts of all slots that extend it; ExpertGroup: those of one input.

    y = W x + B (g * (A x))        A (rank, d_in)   B (d_out, rank)   g (tokens, rank)

All experts lie on one rank axis, so mixed ranks and any number of experts cost the same two products, and the gates act
on the small activation. A and B are never mixed before the product: that would add cross terms (B1 A2).

Modules that read the same tensor (q, k and v; gate and up) form a group, which has one A: whichever of them is called
first computes the outputs of all, and the others pick theirs up if they are called with that very tensor. The
arithmetic is in `kernels/`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..kernels.dispatch import choose_kernels
from ..kernels.group import GroupWeights
from .group_update import GroupUpdate

MAX_SELECTIONS = 16  # sets of slots whose weights a group keeps side by side


class OpenGates(NamedTuple):  # one is made in every layer of every step, and a frozen dataclass takes longer
    """The gates of some positions, of the slots that are open there."""

    start: int  # positions, counted over all rows of the batch
    stop: int
    is_whole: bool  # whether these are all
    slots: tuple[int, ...] | None  # None: all
    gates: Float[Tensor, "positions rank"]


class GateCell:
    """Holds the gates of one decoder layer during a forward pass; shared by the layer's groups."""

    def __init__(self) -> None:
        self.gates: Tensor | tuple[OpenGates, ...] | None = None  # (batch, seq, rank), float32, or by part

    def __getstate__(self) -> dict[str, None]:
        """A copy starts empty: gates belong to a forward pass, and those of training cannot be copied."""
        return {"gates": None}


class FusedLinear(nn.Module):
    """A frozen linear module with experts, which its group computes; trainable ones are the last ranks."""

    new_scale: Tensor | None
    group: "ExpertGroup"
    place: int  # in its group

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

    def forward(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:
        """The base module's output plus every expert's gated update."""
        return self.group.output(self.place, x)


class ExpertGroup(nn.Module):
    """The experts of the modules that read one input."""

    A: Tensor
    columns: Tensor | None
    members: tuple[FusedLinear, ...]

    def __init__(
        self,
        members: Sequence[FusedLinear],
        cell: GateCell,
        *,
        A: Float[Tensor, "_ d_in"],
        ranks: Sequence[int],
        Bt: Sequence[Float[Tensor, "_ _"]],
        columns: Int[Tensor, " columns"] | None = None,
        slot_of_rank: Sequence[int] = (),
    ):
        """Builds the group and makes it that of its members.

        Args:
            members: The modules; all read the same input.
            cell: Where the gates of the decoder layer are.
            A: The frozen experts' A of all members, one under the other.
            ranks: How many rows of A each member has.
            Bt: By member: the frozen experts' B, transposed, scales folded in.
            columns: The gate of every column, trainable ones included; None if each member has all gates, in order.
            slot_of_rank: The slot of every gate; needed where slots are left out.
        """
        super().__init__()
        self.cell = cell
        self.slot_of_rank = tuple(slot_of_rank)
        self.frozen_ranks = list(ranks)
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        for place, part in enumerate(Bt):
            self.register_buffer(f"Bt{place}", part, persistent=False)
        # the members are no submodules: they have their places in the decoder layer
        object.__setattr__(self, "members", tuple(members))
        for place, member in enumerate(members):
            object.__setattr__(member, "group", self)
            member.place = place
        self.trainable = [0 if member.new_A is None else len(member.new_A) for member in members]
        self.waiting = _Waiting()
        self._fast: _FastPath | None = None

    def _apply(self, fn: Callable, recurse: bool = True) -> "ExpertGroup":
        """Moves or casts the buffers; what was derived from them is derived anew."""
        self._fast = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without the outputs of a forward pass and derives its own tensors."""
        return self.__dict__ | {"waiting": _Waiting(), "_fast": None}

    def output(self, place: int, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:
        """One member's output for x: computed now, together with the other members', or already waiting."""
        gates, waiting = self.cell.gates, self.waiting
        if waiting.x is x and waiting.gates is gates and place in waiting.outputs:
            return waiting.claim(place)
        if gates is None:
            raise RuntimeError("FusedLinear ran outside the decoder layer that computes its gates.")
        count = len(self.members)
        if count == 1 or waiting.is_useless():
            return self.outputs(x, gates, (place,))[0]
        found = self.outputs(x, gates, tuple(range(count)))
        waiting.keep(x, gates, {other: found[other] for other in range(count) if other != place})
        return found[place]

    def outputs(self, x: Tensor, gates: Tensor | tuple[OpenGates, ...], places: tuple[int, ...]) -> Sequence[Tensor]:
        """What these members give for x."""
        if torch.is_grad_enabled() and isinstance(gates, Tensor) and self._needs_gradient(x, gates, places):
            return self._differentiable_outputs(x, gates, places)
        if isinstance(gates, Tensor):
            by_position = gates.view(-1, gates.shape[-1])
            gates = (OpenGates(0, len(by_position), True, None, by_position),)
        fast = self._fast_path()
        if fast.serves(x, places):
            flat = x.reshape(-1, x.shape[-1])
            # in two dimensions: the same product as the module's own, with fewer views around it
            found = self._linear_outputs(flat, gates, fast)
            return [output.view(*x.shape[:-1], output.shape[-1]) for output in found]
        outputs = [_owned_output(self.members[place].base, x) for place in places]
        flat = x.reshape(-1, x.shape[-1]).to(outputs[0].dtype)
        weights = self.weights(places, flat.dtype)
        self._update(flat, [output.view(-1, output.shape[-1]) for output in outputs], gates, weights)
        return outputs

    def _linear_outputs(
        self, flat: Float[Tensor, "tokens d_in"], gates: tuple[OpenGates, ...], fast: "_FastPath"
    ) -> Sequence[Float[Tensor, "tokens _"]]:
        """What plain Linears give with their experts; in one call of the kernels where no position is treated apart."""
        part = gates[0]
        if part.is_whole:
            some = fast.weights if part.slots is None else self._selected(part.slots, fast.weights)
            if len(some.A):
                return choose_kernels(flat.device).outputs(flat, fast.linears, part.gates, some)[0]
        outputs = [F.linear(flat, weight, bias) for weight, bias in fast.linears]
        self._update(flat, outputs, gates, fast.weights)
        return outputs

    def _update(
        self,
        flat: Float[Tensor, "tokens d_in"],
        outputs: Sequence[Float[Tensor, "tokens _"]],
        gates: tuple[OpenGates, ...],
        weights: GroupWeights,
    ) -> None:
        kernels = choose_kernels(flat.device)
        for part in gates:
            some = weights if part.slots is None else self._selected(part.slots, weights)
            if not len(some.A):
                continue
            if part.is_whole:
                kernels.update_(flat, outputs, part.gates, some)
            else:
                rows = slice(part.start, part.stop)
                kernels.update_(flat[rows], [output[rows] for output in outputs], part.gates, some)

    def weights(self, places: tuple[int, ...], dtype: torch.dtype) -> GroupWeights:
        """A and B of some members, trainable ranks included, in the type of the outputs."""
        is_whole = len(places) == len(self.members)
        columns = self.columns
        if not is_whole and columns is not None:
            sizes = [frozen + new for frozen, new in zip(self.frozen_ranks, self.trainable, strict=True)]
            columns = torch.cat([columns.split(sizes)[place] for place in places])
        frozen = self.A.split(self.frozen_ranks)
        if is_whole and not any(self.trainable):
            A = self.A
        else:
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

    def _needs_gradient(self, x: Tensor, gates: Tensor, places: tuple[int, ...]) -> bool:
        parameters = (p for place in places for p in self.members[place].parameters())
        return x.requires_grad or gates.requires_grad or any(p.requires_grad for p in parameters)

    def _differentiable_outputs(self, x: Tensor, gates: Tensor, places: tuple[int, ...]) -> Sequence[Tensor]:
        members = [self.members[place] for place in places]
        trained = [p for member in members for p in (member.new_A, member.new_B) if p is not None]
        if (
            all(_is_plain(member.base) for member in members)
            and not torch.is_autocast_enabled(x.device.type)
            and x.dtype == members[0].base.weight.dtype
        ):
            outputs = [None] * len(members)  # computed inside
        else:
            outputs = [member.base(x) for member in members]
        return GroupUpdate.apply(self, places, x, gates, *outputs, *trained)

    def _fast_path(self) -> "_FastPath":
        if self._fast is None:
            self._fast = _FastPath(self)
        return self._fast

    def _selected(self, slots: tuple[int, ...], weights: GroupWeights) -> GroupWeights:
        """The weights of some slots only, kept for the next time; a trainable group never gets here."""
        kept = self._fast_path().selections
        key = (slots, weights.A.dtype, len(weights.Bt))
        if key not in kept:
            if len(kept) >= MAX_SELECTIONS:
                kept.pop(next(iter(kept)))
            kept[key] = select_slots(weights, slots, self.slot_of_rank)
        return kept[key]


class _Waiting:
    """Outputs that were computed for modules which have not been called yet."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.gates: Any = None
        self.outputs: dict[int, Tensor] = {}
        self._unclaimed = 0  # times in a row that nobody came for some

    def keep(self, x: Tensor, gates: Any, outputs: dict[int, Tensor]) -> None:
        """Lets outputs wait for calls with this very tensor under these very gates."""
        self.x, self.gates, self.outputs = x, gates, outputs

    def claim(self, place: int) -> Tensor:
        """Hands one out; after the last, nothing is held any more."""
        found = self.outputs.pop(place)
        self._unclaimed = 0
        if not self.outputs:
            self.x = self.gates = None
        return found

    def is_useless(self) -> bool:
        """Whether these modules do not read the same tensor after all; forgets what nobody came for."""
        if self.x is not None:
            self._unclaimed += 1
            self.x, self.gates, self.outputs = None, None, {}
        return self._unclaimed >= 2


class _FastPath:
    """What does not change from call to call of a group that runs without gradients."""

    def __init__(self, group: ExpertGroup):
        bases: list[Any] = [member.base for member in group.members]
        self.places = tuple(range(len(bases)))
        self.selections: dict[Any, GroupWeights] = {}
        is_frozen = not any(group.trainable)
        self.dtype = bases[0].weight.dtype if all(type(base) is nn.Linear for base in bases) and is_frozen else None
        if self.dtype is not None:
            self.hooks = [hooks for base in bases for hooks in (base._forward_hooks, base._forward_pre_hooks)]
            self.linears = [(base.weight, base.bias) for base in bases]
            self.weights = group.weights(self.places, self.dtype)
            self.device = self.weights.A.device.type

    def serves(self, x: Tensor, places: tuple[int, ...]) -> bool:
        """Whether this call is an ordinary one: plain frozen Linears of the type of x, without hooks."""
        is_ordinary = self.dtype is not None and x.dtype == self.dtype and places == self.places
        return is_ordinary and not any(self.hooks) and not torch.is_autocast_enabled(self.device)


def select_slots(weights: GroupWeights, slots: tuple[int, ...], slot_of_rank: Sequence[int]) -> GroupWeights:
    """The columns of some slots; their gates are those of these slots' ranks, in order."""
    is_chosen = [slot in slots for slot in slot_of_rank]
    if weights.columns is None:
        gate_of_column = list(range(len(slot_of_rank))) * len(weights.Bt)
    else:
        gate_of_column = weights.columns.tolist()
    place_of_gate = {gate: place for place, gate in enumerate(g for g, chosen in enumerate(is_chosen) if chosen)}
    kept = [column for column, gate in enumerate(gate_of_column) if is_chosen[gate]]
    device, start, Bt = weights.A.device, 0, []
    for rows in weights.Bt:
        own = [column - start for column in kept if start <= column < start + len(rows)]
        Bt.append(rows[torch.tensor(own, dtype=torch.long, device=device)])
        start += len(rows)
    columns = None
    if weights.columns is not None:
        columns = torch.tensor([place_of_gate[gate_of_column[column]] for column in kept], dtype=torch.long).to(device)
    A = weights.A[torch.tensor(kept, dtype=torch.long, device=device)]
    return GroupWeights(A=A, Bt=tuple(Bt), columns=columns)


def _is_plain(base: nn.Module) -> bool:
    """Whether a module is a frozen Linear that nobody listens to, which may be computed without being called."""
    is_linear = type(base) is nn.Linear and not base._forward_hooks and not base._forward_pre_hooks
    return is_linear and not any(parameter.requires_grad for parameter in base.parameters())


def _owned_output(base: nn.Module, x: Tensor) -> Tensor:
    """The base module's output in memory that may be written to: what another module returns may be kept by it."""
    output = base(x)
    if type(base) in (nn.Linear, Conv1D) and not base._forward_hooks:
        return output
    return output.clone(memory_format=torch.contiguous_format)
