"""FusedLinear: a frozen linear module with the experts of all slots. ExpertGroup: the modules that share an input.

    y = W x + B (g * (A x))        A (rank, d_in)   B (d_out, rank)   g (tokens, rank)

All experts lie on one rank axis, so mixed ranks and any number of experts need the same two matrix products, and the
gates scale the rank-sized activation. A and B are never mixed before the product, which would add cross terms (B1 A2).
The ranks of a slot are contiguous, so the weights of a range of slots are views.

Modules that read the same tensor (q, k and v; gate and up) form a group with one stacked A. The first member called
computes the outputs of all; the others take theirs from the state of the forward pass (forward_state.py) if they are
called with the same tensor object. The arithmetic is in `kernels/`.
"""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...domains.errors import IncompatibleError, InputError
from ...domains.linear import linear_shape
from ..kernels.dispatch import choose_kernels
from ..kernels.group import GroupWeights, Linears
from .forward_state import Gates, OpenGates, SiblingOutputs, running_state
from .gates import device_only
from .group_update import GroupUpdate

DESCRIPTIONS = {  # attributes and methods of a weight that say nothing of its values
    *("shape", "size", "dim", "ndim", "numel", "stride", "dtype", "device", "layout", "is_cuda", "is_meta"),
    *("requires_grad", "element_size", "itemsize", "nbytes", "is_floating_point", "is_contiguous", "__repr__"),
}
MAX_MISSES = 2  # consecutive calls of group members with different tensors, after which each member computes alone


class FusedLinear(nn.Module):
    """Frozen linear module with experts, computed by its group; trainable experts have the last ranks."""

    new_scale: Tensor | None
    group: "ExpertGroup"
    place: int  # index in its group

    def __init__(
        self,
        base: nn.Module,
        *,
        new_A: Float[Tensor, "new d_in"] | None = None,
        new_B: Float[Tensor, "d_out new"] | None = None,
        new_scale: Float[Tensor, " new"] | None = None,
    ):
        """Build the module around `base`, without copying it.

        Args:
            base: The frozen module that the experts extend.
            new_A: A of the trainable experts, or None.
            new_B: B of the trainable experts, scales not folded in.
            new_scale: Scales of the trainable ranks.
        """
        super().__init__()
        self.base = base
        self.register_buffer("new_scale", new_scale, persistent=False)
        self.new_A = None if new_A is None else nn.Parameter(new_A)
        self.new_B = None if new_B is None else nn.Parameter(new_B)

    def _apply(self, fn: Callable, recurse: bool = True) -> "FusedLinear":
        """Move or cast the base module; experts in training stay float32."""
        self.base._apply(fn, recurse)
        super()._apply(device_only(fn), recurse=False)
        return self

    def forward(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:
        """Return the base module's output plus every expert's gated update."""
        return self.group.output(self.place, x)

    @property
    def weight(self) -> Tensor:
        """Weight of the base module; inside a forward pass, its shape, dtype and device only."""
        weight: Any = self.base.weight
        return weight if running_state() is None else weight.as_subclass(_DescribedWeight)

    @property
    def bias(self) -> Tensor | None:
        """Bias of the base module."""
        bias: Any = self.base.bias
        return bias

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return linear_shape(self.base)[0]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return linear_shape(self.base)[1]


class _DescribedWeight(Tensor):
    """Weight that can be described but not computed with: a product with it would lack the experts' update."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # noqa: D102
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        if name not in DESCRIPTIONS:
            raise IncompatibleError(
                "This model reads the weight of a module with experts, which would lose their effect.",
                cause=f"it calls {name} on the weight",
                fix="leave the module out of --targets",
            )
        return super().__torch_function__(func, types, args, kwargs or {})


class ExpertGroup(nn.Module):
    """Experts of the modules that read the same input."""

    A: Tensor
    columns: Tensor | None
    members: tuple[FusedLinear, ...]
    layer: Hashable

    def __init__(
        self,
        members: Sequence[FusedLinear],
        layer: Hashable,
        *,
        A: Float[Tensor, "_ d_in"],
        ranks: Sequence[int],
        Bt: Sequence[Float[Tensor, "_ _"]],
        columns: Int[Tensor, " columns"] | None = None,
        slot_of_rank: Sequence[int] = (),
        names: Sequence[str] = (),
    ):
        """Build the group and assign it to its members.

        Args:
            members: The modules; all read the same input.
            layer: Key of the decoder layer's gates in the state of a forward pass: its LayerGates.
            A: A of the frozen experts of all members, stacked by row.
            ranks: Number of rows of A of each member.
            Bt: By member: B of the frozen experts, transposed, scales folded in.
            columns: Gate index of every column, trainable ones included; None if each member has all gates, in order.
            slot_of_rank: Slot of every gate; needed where closed slots are skipped.
            names: Paths of the modules, for messages.
        """
        super().__init__()
        self.slot_of_rank, self.names = list(slot_of_rank), tuple(names)
        self.frozen_ranks = list(ranks)
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        for place, part in enumerate(Bt):
            self.register_buffer(f"Bt{place}", part, persistent=False)
        # not registered as submodules: members and gates belong to the decoder layer
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "members", tuple(members))
        for place, member in enumerate(members):
            object.__setattr__(member, "group", self)
            member.place = place
        self.trainable = [0 if member.new_A is None else len(member.new_A) for member in members]
        self.misses = 0
        self.places = tuple(range(len(members)))  # of all members
        # derived from members and buffers, by places
        self._bases: dict[tuple[int, ...], _BaseModules] = {}
        self._frozen: dict[tuple[tuple[int, ...], torch.dtype], SlotWeights] = {}

    def _apply(self, fn: Callable, recurse: bool = True) -> "ExpertGroup":
        """Move or cast the buffers, and drop what was derived from them."""
        self._bases, self._frozen = {}, {}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Exclude derived state from copies."""
        return self.__dict__ | {"_bases": {}, "_frozen": {}}

    def output(self, place: int, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*tokens d_out"]:
        """Return one member's output for x; the first member called computes the outputs of all."""
        state = running_state()
        gates = None if state is None else state.gates.get(self.layer)
        if state is None or gates is None:
            raise RuntimeError("FusedLinear ran outside the decoder layer that computes its gates.")
        if len(self.members) == 1:
            return self.outputs(x, gates, self.places)[0]
        siblings = state.siblings.get(self)
        if siblings is not None and place in siblings.outputs:
            if siblings.fit(x, gates):
                if self.misses:
                    self.misses = 0
                return siblings.outputs.pop(place)
            self.misses += 1
        if not self._shares_input():
            return self.outputs(x, gates, (place,))[0]
        found = dict(enumerate(self.outputs(x, gates, self.places)))
        output = found.pop(place)
        state.siblings[self] = SiblingOutputs(x, gates, found)
        return output

    def _shares_input(self) -> bool:
        """Return whether the members are expected to read the same tensor; a guess that affects speed only.

        A pre-hook may replace a member's input or write to the shared one.
        """
        return self.misses < MAX_MISSES and not any([member._forward_pre_hooks for member in self.members])

    def outputs(self, x: Tensor, gates: Gates, places: tuple[int, ...]) -> Sequence[Tensor]:
        """Return the outputs of these members for x."""
        self._check_positions(x, gates, places)
        if isinstance(gates, Tensor):
            if torch.is_grad_enabled() and self._needs_gradient(x, gates, places):
                return self._differentiable_outputs(x, gates, places)
            by_position = gates.view(-1, gates.shape[-1])
            gates = (OpenGates(0, len(by_position), True, None, by_position),)
        bases = self._bases.get(places)
        if bases is None or not bases.are_current():
            bases = self._bases[places] = _BaseModules([self.members[place] for place in places])
        if bases.are_plain(x):
            # in two dimensions: the same product as the module's, with fewer views
            flat, leading = x.reshape(-1, x.shape[-1]), x.shape[:-1]
            found = self._linear_outputs(flat, gates, bases.linears, self._slot_weights(places, x.dtype))
            return [output.view(*leading, -1) for output in found]
        outputs = [_owned_output(self.members[place].base, x) for place in places]
        flat = x.reshape(-1, x.shape[-1]).to(outputs[0].dtype)
        flat_outputs = [output.view(-1, output.shape[-1]) for output in outputs]
        _update(flat, flat_outputs, gates, self._slot_weights(places, flat.dtype))
        return outputs

    def _check_positions(self, x: Tensor, gates: Gates, places: tuple[int, ...]) -> None:
        """Raise InputError if x has another number of positions than the gates, which would then be misapplied."""
        given = x.shape[:-1].numel()
        known = gates.shape[:-1].numel() if isinstance(gates, Tensor) else gates[-1].stop
        if given != known:
            name = self.names[places[0]] if self.names else "A module"
            raise InputError(
                f"{name} cannot have experts in this model.",
                cause=f"it is called with {given} positions, its decoder layer with {known}",
                fix="leave it out of the targets",
            )

    def _linear_outputs(
        self,
        flat: Float[Tensor, "tokens d_in"],
        gates: tuple[OpenGates, ...],
        linears: Linears,
        weights: "SlotWeights",
    ) -> Sequence[Float[Tensor, "tokens _"]]:
        """Return the outputs of plain Linears with their experts, in one kernel call if no slot is skipped."""
        first, whole = gates[0], weights.whole
        if first.slots is None and first.is_whole and len(whole.A):
            return choose_kernels(flat.device).outputs(flat, linears, first.gates, whole)[0]
        outputs = [F.linear(flat, weight, bias) for weight, bias in linears]
        _update(flat, outputs, gates, weights)
        return outputs

    def _slot_weights(self, places: tuple[int, ...], dtype: torch.dtype) -> "SlotWeights":
        """Return the weights of some members for calls without gradients, cached unless they train."""
        found = self._frozen.get((places, dtype))
        if found is None:
            found = SlotWeights(self.weights(places, dtype), self.slot_of_rank)
            if not any(self.trainable[place] for place in places):
                self._frozen[places, dtype] = found
        return found

    def weights(self, places: tuple[int, ...], dtype: torch.dtype) -> GroupWeights:
        """Return A and B of some members, trainable ranks included, in `dtype`."""
        is_whole = len(places) == len(self.members)
        columns = self.columns
        if not is_whole and columns is not None:
            sizes = [frozen + new for frozen, new in zip(self.frozen_ranks, self.trainable, strict=True)]
            columns = torch.cat([columns.split(sizes)[place] for place in places])
        frozen = self.A.split(self.frozen_ranks)
        parts = [part for place in places for part in (frozen[place], self.members[place].new_A) if part is not None]
        if is_whole and not any(self.trainable):
            A = self.A
        else:
            A = parts[0] if len(parts) == 1 else torch.cat([part.to(dtype) for part in parts])
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
            outputs = [None] * len(members)  # computed inside GroupUpdate
        else:
            outputs = [member.base(x) for member in members]
        return GroupUpdate.apply(self, places, x, gates, *outputs, *trained)


class SlotWeights:
    """Frozen weights of a group: all slots, and views of ranges of slots."""

    def __init__(self, whole: GroupWeights, slot_of_rank: Sequence[int]):
        """Wrap weights whose slots are contiguous.

        Args:
            whole: Weights of all slots.
            slot_of_rank: Slot of every gate, sorted.
        """
        self.whole, self.slot_of_rank = whole, slot_of_rank
        self._single: dict[int, list[GroupWeights | None]] = {}

    def of(self, slots: tuple[int, int]) -> list[GroupWeights | None]:
        """Return each module's weights for a half-open range of slots; None for a module without ranks in it."""
        first, stop = slots
        if stop - first != 1:
            return self._views(first, stop)
        # views of single slots are cached: most steps need two or three of many slots
        if first not in self._single:
            self._single[first] = self._views(first, stop)
        return self._single[first]

    def _views(self, first: int, stop: int) -> list[GroupWeights | None]:
        start, views = 0, []
        first_gate, gates = (bisect_left(self.slot_of_rank, slot) for slot in (first, stop))
        for Bt in self.whole.Bt:
            columns = range(len(Bt)) if self.whole.columns is None else self._columns[start : start + len(Bt)]
            begin, end = (bisect_left(columns, gate) for gate in (first_gate, gates))
            own = None
            if self.whole.columns is not None and end - begin < gates - first_gate:
                own = self.whole.columns[start + begin : start + end] - first_gate
            views.append(
                GroupWeights(A=self.whole.A[start + begin : start + end], Bt=(Bt[begin:end],), columns=own)
                if end > begin
                else None
            )
            start += len(Bt)
        return views

    @cached_property
    def _columns(self) -> list[int]:
        assert self.whole.columns is not None
        return self.whole.columns.tolist()


class _BaseModules:
    """Base modules of some members, and whether F.linear can replace calls of them.

    Everything that this was found from is compared by identity before each use: a base module, weight, bias or forward
    that somebody replaced is seen.
    """

    def __init__(self, members: Sequence[FusedLinear]):
        bases: list[Any] = [member.base for member in members]
        self.linears: Linears = [(base.weight, base.bias) for base in bases] if all(map(_is_linear, bases)) else []
        self.dtype = self.linears[0][0].dtype if self.linears else None
        # direct reads of the dictionaries: attributes of modules cost ten times as much
        self._watched: list[tuple[dict[str, Any], str, Any]] = [(m._modules, "base", m.base) for m in members]
        for base, (weight, bias) in zip(bases, self.linears, strict=False):
            names = {"weight": weight, "bias": bias}
            self._watched += [(base._parameters, name, value) for name, value in names.items()]
            self._watched.append((base.__dict__, "forward", None))
        self._hooks = [hooks for base in bases for hooks in (base._forward_hooks, base._forward_pre_hooks)]

    def are_current(self) -> bool:
        """Return whether the members still hold these modules, and these their weights and forward."""
        for values, name, value in self._watched:  # noqa: SIM110  # a generator takes twice as long
            if values.get(name) is not value:
                return False
        return True

    def are_plain(self, x: Tensor) -> bool:
        """Return whether all are ordinary Linears in the dtype of x, without hooks, outside autocast."""
        if x.dtype is not self.dtype or any(self._hooks):
            return False
        return not torch.is_autocast_enabled(x.device.type)


def _update(
    flat: Float[Tensor, "tokens d_in"],
    outputs: Sequence[Float[Tensor, "tokens _"]],
    gates: tuple[OpenGates, ...],
    weights: SlotWeights,
) -> None:
    """Add the experts of each rectangle to the outputs, in place."""
    kernels = choose_kernels(flat.device)
    for part in gates:
        x, into = flat, outputs
        if not part.is_whole:
            x, into = flat[part.start : part.stop], [output[part.start : part.stop] for output in outputs]
        if part.slots is None:
            if len(weights.whole.A):
                kernels.update_(x, into, part.gates, weights.whole)
            continue
        for output, own in zip(into, weights.of(part.slots), strict=True):
            if own is not None:
                kernels.update_(x, [output], part.gates, own)


def _is_linear(base: nn.Module) -> bool:
    """Return whether a module is an nn.Linear with its own forward and a weight that is not quantized."""
    return type(base) is nn.Linear and type(base.weight) is nn.Parameter and "forward" not in base.__dict__


def _is_plain(base: nn.Module) -> bool:
    """Return whether a module is a frozen Linear without hooks, so that F.linear can replace the call."""
    is_linear = _is_linear(base) and not base._forward_hooks and not base._forward_pre_hooks
    return is_linear and not any(parameter.requires_grad for parameter in base.parameters())


def _owned_output(base: nn.Module, x: Tensor) -> Tensor:
    """Return the base module's output, cloned unless it is known to be fresh memory that can be written to."""
    output = base(x)
    if not isinstance(output, Tensor):
        raise IncompatibleError(
            f"A {type(base).__name__} cannot have experts.",
            cause=f"it returns a {type(output).__name__} instead of one tensor",
            fix="leave it out of --targets",
        )
    if type(base) in (nn.Linear, Conv1D) and not base._forward_hooks:
        return output
    return output.clone(memory_format=torch.contiguous_format)
