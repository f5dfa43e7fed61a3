"""ForwardState: the state of one forward pass of one composed model.

Modules keep no state of a forward pass, so threads can share a model, forward passes can nest, and an exception leaves
nothing behind. The router's sums, which outlive a forward pass, are in the key-value cache (router/cache.py).

The current state is thread-local, because a forward pass runs in one thread from start to end.
"""

import copy
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .active import Part


class OpenGates(NamedTuple):  # created in every layer of every step; a frozen dataclass is slower
    """Gates of a rectangle: a range of positions by the ranks of a range of slots."""

    start: int  # flattened (batch, seq) positions
    stop: int
    is_whole: bool  # whether the range covers all positions
    slots: tuple[int, int] | None  # half-open range; None: all
    gates: Float[Tensor, "positions rank"]  # float32


Gates = Tensor | tuple[OpenGates, ...]  # of one layer: (batch, seq, rank) with gradients enabled, else by rectangle


class SiblingOutputs:
    """Outputs of group members that have not been called yet, keyed by the identity of input and gates."""

    def __init__(self, x: Tensor, gates: Gates, outputs: dict[int, Tensor]):
        self.x, self.gates, self.outputs = x, gates, outputs
        self.version = _version(x)

    def fit(self, x: Tensor, gates: Gates) -> bool:
        """Return whether `x` is the same tensor object, not modified in place since, and `gates` the same object."""
        return self.x is x and self.gates is gates and self.version == _version(x)


class SlotGates:
    """Slot gates of a forward pass; None until they are computed."""

    def __init__(self) -> None:
        self.gates: Float[Tensor, "batch seq slots"] | None = None
        self.by_position: Float[Tensor, "positions slots"] | None = None  # the same, for use without gradients
        self.parts: list[Part] = []  # the parts to compute


class ForwardState:
    """Inputs of one forward pass of a decoder, and the gates and outputs computed during it."""

    def __init__(
        self,
        owner: Any,
        *,
        input_ids: Tensor | None = None,
        mask: Any = None,
        position_ids: Tensor | None = None,
        cumulative_lengths: Tensor | None = None,
        past: int | Tensor = 0,
    ):
        """Store the arguments of the decoder's forward.

        Args:
            owner: The Routing of the composed model.
            input_ids: Token ids, if known.
            mask: The attention mask in any of its forms.
            position_ids: Positions inside each text.
            cumulative_lengths: `cu_seq_lens_q` of flash attention, for packed rows.
            past: Positions in the key-value cache before this forward pass.
        """
        self.owner = owner
        self.input_ids, self.mask, self.past = input_ids, mask, past
        self.position_ids, self.cumulative_lengths = position_ids, cumulative_lengths
        self.slots = SlotGates()
        self.gates: dict[Hashable, Gates] = {}  # by LayerGates
        self.siblings: dict[Hashable, SiblingOutputs] = {}  # by ExpertGroup

    def for_layer(self, layer: Hashable = None, gates: Gates | None = None) -> "ForwardState":
        """Return a state of the same forward pass with no sibling outputs and at most the gates of one layer."""
        state = copy.copy(self)
        state.gates, state.siblings = {}, {}
        if gates is not None:
            state.gates[layer] = gates
        return state


class _Running(threading.local):
    """State of the innermost forward pass of each thread, and inputs of the modules around its decoder."""

    def __init__(self) -> None:
        self.state: ForwardState | None = None
        self.outer: tuple[Any, Mapping[str, Any]] | None = None


_running = _Running()


def running_state() -> ForwardState | None:
    """Return the state of the forward pass running in this thread, or None outside one."""
    return _running.state


def run_with(state: ForwardState, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call `function` with `state` as the running state; restore the previous state even after an exception."""
    before = _running.state
    try:
        _running.state = state
        return function(*args, **kwargs)
    finally:
        _running.state = before


def run_with_inputs(owner: Any, inputs: Mapping[str, Any], function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call `function`, in which `outer_inputs(owner)` returns these inputs unless an enclosing call has given others.

    A vision-language model gets token ids and calls its decoder with embeddings.
    """
    before = _running.outer
    try:
        if before is None or before[0] is not owner:
            _running.outer = owner, inputs
        return function(*args, **kwargs)
    finally:
        _running.outer = before


def outer_inputs(owner: Any) -> Mapping[str, Any]:
    """Return the arguments of the outermost module around the decoder that is running in this thread."""
    outer = _running.outer
    return outer[1] if outer is not None and outer[0] is owner else {}


class StateCarrier:
    """Checkpointing function of a module that recomputes it under the state of the original forward pass.

    The recomputation happens in the backward pass, after the forward pass has ended and others may have run.
    """

    def __init__(self, function: Callable, module: nn.Module):
        self.function, self.module = function, module

    def __call__(self, forward: Callable, *args: Any) -> Any:
        """Checkpoint `forward(*args)`."""
        running, layer = running_state(), getattr(self.module, "expert_gates", None)
        if running is None:
            return self.function(forward, *args)
        # without gates and outputs: they would form a reference cycle with the graph
        state = running.for_layer()

        def run(gates: Gates | None, *args: Any) -> Any:
            return run_with(state.for_layer(layer, gates), forward, *args)

        # gates are an argument so that reentrant and non-reentrant checkpointing both propagate their gradient
        return self.function(run, running.gates.get(layer), *args)


def _version(x: Tensor) -> int | None:
    """Return the in-place version counter of x; None where torch does not keep one."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version
