"""ForwardState: everything that belongs to one forward pass of one composed model.

Modules hold nothing of a forward: threads may share a model, forwards may nest, and one that ends in an exception takes
everything it knew along. What must outlive a forward, the router's sums, is in the key-value cache (router/cache.py).

The running state is kept by thread, because a forward runs in one thread from its beginning to its end.
"""

import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .active import Part


class OpenGates(NamedTuple):  # one is made in every layer of every step, and a frozen dataclass takes longer
    """Gates of a rectangle: some positions, and the ranks of some slots."""

    start: int  # positions, counted over all rows of the batch
    stop: int
    is_whole: bool  # whether these are all positions
    slots: tuple[int, int] | None  # from the first to before the second; None: all
    gates: Float[Tensor, "positions rank"]  # float32


Gates = Tensor | tuple[OpenGates, ...]  # of one layer: (batch, seq, rank) where autograd follows, else by rectangle


class SiblingOutputs:
    """Outputs for modules of a group that have not been called yet, valid for one input under one set of gates."""

    def __init__(self, x: Tensor, gates: Gates, outputs: dict[int, Tensor]):
        self.x, self.gates, self.outputs = x, gates, outputs
        self.version = _version(x)

    def fit(self, x: Tensor, gates: Gates) -> bool:
        """Return whether `x` is the very input, unchanged, and `gates` are the very gates."""
        return self.x is x and self.gates is gates and self.version == _version(x)


class SlotGates:
    """Slot gates of a forward pass, once they are found."""

    def __init__(self) -> None:
        self.gates: Float[Tensor, "batch seq slots"] | None = None
        self.by_position: Float[Tensor, "positions slots"] | None = None  # the same, for forwards without gradients
        self.parts: list[Part] = []  # what has to be computed


class ForwardState:
    """What one forward pass of a decoder is given, and what it finds."""

    def __init__(
        self,
        owner: Any,
        *,
        input_ids: Tensor | None = None,
        mask: Any = None,
        position_ids: Tensor | None = None,
        past: int | Tensor = 0,
    ):
        """Start with what the decoder is called with.

        Args:
            owner: The Routing of the composed model.
            input_ids: Token ids, if they are known.
            mask: The attention mask in any of its forms.
            position_ids: Positions inside each text; they tell where texts of a packed row begin.
            past: Positions in the key-value cache before this forward.
        """
        self.owner = owner
        self.input_ids, self.mask, self.position_ids, self.past = input_ids, mask, position_ids, past
        self.slots = SlotGates()
        self.gates: dict[Hashable, Gates] = {}  # by LayerGates
        self.siblings: dict[Hashable, SiblingOutputs] = {}  # by ExpertGroup

    def for_layer(self, layer: Hashable = None, gates: Gates | None = None) -> "ForwardState":
        """Return a state of the same forward that knows the gates of one layer at most, and no outputs."""
        state = ForwardState(
            self.owner, input_ids=self.input_ids, mask=self.mask, position_ids=self.position_ids, past=self.past
        )
        state.slots = self.slots
        if gates is not None:
            state.gates[layer] = gates
        return state


class _Running(threading.local):
    """The innermost forward of each thread."""

    def __init__(self) -> None:
        self.state: ForwardState | None = None


_running = _Running()


def running_state() -> ForwardState | None:
    """Return the state of the forward pass that runs in this thread, or None outside of one."""
    return _running.state


def run_with(state: ForwardState, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a function as part of a forward pass; however it ends, the state before is restored."""
    before = _running.state
    try:
        _running.state = state
        return function(*args, **kwargs)
    finally:
        _running.state = before


class StateCarrier:
    """Checkpointing function of a module that gives a recomputation the state of its own forward.

    A layer is computed again in the backward pass, after its forward has ended and perhaps others have run.
    """

    def __init__(self, function: Callable, module: nn.Module):
        self.function, self.module = function, module

    def __call__(self, forward: Callable, *args: Any) -> Any:
        """Checkpoint `forward(*args)`."""
        running, layer = running_state(), getattr(self.module, "expert_gates", None)
        if running is None:
            return self.function(forward, *args)
        # without gates and outputs: a graph that holds what holds the graph is never freed
        state = running.for_layer()

        def run(gates: Gates | None, *args: Any) -> Any:
            return run_with(state.for_layer(layer, gates), forward, *args)

        # as an argument, so that either kind of checkpointing returns the gradient of gates to the layer's own forward
        return self.function(run, running.gates.get(layer), *args)


def _version(x: Tensor) -> int | None:
    """Return a number that changes when x is written to in place; None where torch counts no versions."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version
