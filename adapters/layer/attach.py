"""Attaching a stack of banks to a base model, and taking it off again.

`attach` returns a new model object that shares every parameter of the base and owns nothing of it: the base is never
written to, several composed models may live on one base, and each keeps its own routing state. The result is an
ordinary transformers model: `generate`, beam search, padding on either side, the key-value cache and Trainer work as
ever.

Because parameters are shared, move or cast the base before it is composed: `composed.to(...)` would move the base too.
With gradient checkpointing, run the backward pass of a forward before the next forward: the recomputation reads the
gates of the latest one.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...domains.base_model import ModelLayout, bind_arguments, find_layout, first_tensor
from ...domains.errors import InputError
from ..bank import ExpertBank, LayerExperts
from ..router.cache import find_cache, router_layer, seen_by_themselves
from ..router.router import DomainRouter, last_tokens, whole_prompts
from .active import SLOT_THRESHOLD, Part, close_small_gates, plan_parts
from .fused import FusedLinear, GateCell, OpenGates
from .gated_mlp import GatedMLP, gated_mlps
from .gates import LayerGates
from .stack import Stack, build_gates, build_group
from .stacked import StackedComposition, StackedLayer


class Routing:
    """What one composed model knows between the hooks of a forward pass; `model.routing`."""

    def __init__(
        self,
        stack: Stack | StackedComposition,
        layout: ModelLayout,
        router: DomainRouter | None,
        fixed: Tensor | None,
        threshold: float,
    ):
        self.stack = stack
        self.layout = layout
        self.router = router
        self.fixed = fixed  # constant slot gates (slots,), used instead of the router's
        self.threshold = threshold
        self.slot_gate: Tensor | None = None  # of the latest forward: (batch, seq, slots)
        self.by_position = torch.empty(0, 0)  # the same as (positions, slots), for forwards without gradients
        self.trace: list[Tensor] | None = None  # collects the slot gates of forwards while it is a list
        self.prompts: Tensor | None = None  # positions of each prompt that is read as a whole
        self._input_ids: Tensor | None = None
        self._mask: Tensor | None = None
        self._parts: list[Part] = []
        self._past: int | Tensor = 0  # positions in the key-value cache before this forward

    @contextmanager
    def reading_prompts(self, lengths: int | Sequence[int] | None = None) -> Iterator[None]:
        """While it is open, prompts are read as a whole: all positions of a prompt have the slot gates of its last one.

        Slot gates are causal otherwise, as they must be where text is predicted token by token. But a prompt is known
        before anything is predicted, and its first tokens say little of what it is about: read under other gates, they
        leave keys and values behind that mislead the answer (docs/log.md has what that costs). Only a forward pass
        over an empty cache, or none, reads a prompt; what follows it is causal.

        Args:
            lengths: Positions of each row's prompt, padding in front included, or one number for all rows. None: all
                that a forward pass over an empty cache is given. `generate` gives it more than the prompt where it
                keeps no cache, or checks guesses of an assistant or of a prompt lookup: say the number there.
        """
        before = self.prompts
        given = torch.iinfo(torch.int64).max if lengths is None else lengths
        self.prompts = torch.tensor(given, dtype=torch.int64).reshape(-1)
        try:
            yield
        finally:
            self.prompts = before

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the decoder: remembers what the router needs."""
        named = bind_arguments(module, args, kwargs)
        self._input_ids, self._mask = named.get("input_ids"), named.get("attention_mask")
        cache = find_cache(named.values())
        self._past = 0 if cache is None else cache.get_seq_length()
        if isinstance(self._past, Tensor):  # a static cache counts on in this very tensor
            self._past = self._past.clone()
        self.slot_gate = None

    def enter(self, args: tuple, kwargs: dict) -> tuple[Tensor, Float[Tensor, "batch seq slots"], list[Part]]:
        """The hidden state that enters a decoder layer, the slot gates, and what of it has to be computed."""
        hidden = first_tensor(args, kwargs)
        if self.slot_gate is None:
            with torch.no_grad():
                slot_gate = self._slot_gate(hidden, find_cache([*args, *kwargs.values()]))
                self.slot_gate = close_small_gates(slot_gate, self.threshold)
                self.by_position = self.slot_gate.reshape(-1, self.slot_gate.shape[-1])
                self._parts = self._plan(self.slot_gate)
            if self.trace is not None:
                self.trace.append(self.slot_gate.detach().cpu())
        return hidden, self.slot_gate, self._parts

    def _plan(self, slot_gate: Float[Tensor, "batch seq slots"]) -> list[Part]:
        # reading values would wait for a GPU and break a graph; there closed slots are skipped by the kernels
        if not self.threshold or self.stack.trainable or slot_gate.is_cuda or torch.compiler.is_compiling():
            return [Part(0, slot_gate.shape[0] * slot_gate.shape[1], None)]
        return plan_parts(slot_gate)

    def _slot_gate(self, hidden: Tensor, cache: Any) -> Float[Tensor, "batch seq slots"]:
        if self.fixed is not None:
            return self.fixed.to(hidden.device).expand(*hidden.shape[:2], -1)
        if self.router is None or self._input_ids is None:
            raise InputError(
                "This composition routes by its input tokens.",
                cause="the model was called with inputs_embeds instead of input_ids",
                fix="pass input_ids, or compose with --static",
            )
        gates = self.router.slot_gates(self._sums(self.router, self._input_ids, hidden, cache))
        if self.prompts is None or (isinstance(self._past, int) and self._past):
            return gates
        if len(self.prompts) not in (1, len(gates)):
            raise InputError(
                "The lengths of the prompts do not fit the batch.",
                cause=f"there are {len(self.prompts)} lengths for {len(gates)} rows",
                fix="prompts that are padded on the left are equally long: reading_prompts(input_ids.shape[1])",
            )
        whole = whole_prompts(gates, self.prompts.clamp(max=gates.shape[1]).expand(len(gates)))
        return torch.where(self._past == 0, whole, gates) if isinstance(self._past, Tensor) else whole

    def _sums(self, router: DomainRouter, ids: Tensor, hidden: Tensor, cache: Any) -> Float[Tensor, "batch seq sums"]:
        """The router's sums up to each new position, continuing from the cache if there is one."""
        is_real = self._real_tokens(hidden, is_static=cache is not None and cache.is_compileable)
        if cache is None:
            return router.increments(ids, hidden, is_real).cumsum(1)
        kept = router_layer(cache, past=self._past, layers=self.layout.count, sums=2 * router.slots + 1)
        last = last_tokens(ids, is_real, kept.last_tokens())
        return kept.append(router.increments(ids, hidden, is_real, last), last[:, 1:])

    def _real_tokens(self, hidden: Tensor, *, is_static: bool) -> Tensor:
        """True where a position holds text; padding adds no evidence."""
        shape = hidden.shape[:2]
        mask = self._mask
        if is_static and isinstance(mask, Mapping):  # one for each kind of layer
            mask = mask.get("full_attention", next(iter(mask.values())))
        is_made = is_static and isinstance(mask, Tensor) and mask.ndim == 4  # by `generate`, which adds text one by one
        if mask is None or (is_made and shape[1] == 1):
            return torch.ones(shape, dtype=torch.bool, device=hidden.device)
        if is_made:
            return seen_by_themselves(mask, shape[1], self._past)
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise InputError(
                "Routing needs an attention mask of one number for each token.",
                cause="found one that says which token sees which",
                fix="pass the mask that the tokenizer gives, of shape (batch, tokens)",
            )
        # with a cache the mask covers the past as well: the new positions are its last columns
        return mask[:, -shape[1] :].to(device=hidden.device, dtype=torch.bool)


class LayerHook:
    """Forward pre-hook of an expert-bearing layer: computes its gates."""

    def __init__(self, routing: Routing, gates: LayerGates, cell: GateCell):
        self.routing = routing
        self.gates = gates
        self.cell = cell

    def __call__(self, _layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Sets the gates of the layer, by part where parts are left out."""
        hidden, slot_gate, parts = self.routing.enter(args, kwargs)
        if torch.is_grad_enabled():
            self.cell.gates = self.gates(hidden, slot_gate)
            return
        hidden, slot_gate = hidden.reshape(-1, hidden.shape[-1]), self.routing.by_position
        if len(parts) == 1:
            slots = parts[0].slots
            self.cell.gates = (OpenGates(0, hidden.shape[0], True, slots, self.gates(hidden, slot_gate, slots)),)
            return
        found = []
        for part in parts:
            rows = slice(part.start, part.stop)
            gates = self.gates(hidden[rows], slot_gate[rows], part.slots)
            found.append(OpenGates(part.start, part.stop, False, part.slots, gates))
        self.cell.gates = tuple(found)


def attach(
    base: PreTrainedModel,
    stack: Stack | StackedComposition,
    *,
    router: DomainRouter | None,
    fixed: Float[Tensor, " slots"] | None = None,
    threshold: float = SLOT_THRESHOLD,
) -> PreTrainedModel:
    """A composed model over `base`.

    Args:
        base: The frozen base model; not changed.
        stack: The banks by slot, or the same as it was kept.
        router: Gives the slot gates; may be None if they are fixed.
        fixed: Constant slot gates instead of the router's.
        threshold: A slot gate below it is zero, and its slot is skipped where that holds; 0 skips nothing.

    Raises:
        InputError: Neither a router nor fixed slot gates.
    """
    if router is None and fixed is None:
        raise InputError("A composed model needs a router or fixed slot gates.")
    model = copy_sharing_parameters(base)
    layout = find_layout(model)
    device = next(base.parameters()).device
    routing = Routing(stack, layout, None if router is None else router.to(device), fixed, threshold)
    model.routing = routing  # type: ignore[assignment]
    model.reading_prompts = routing.reading_prompts  # type: ignore[assignment]
    for index in stack.layers:
        layer = model.get_submodule(f"{layout.layers}.{index}")
        _extend_layer(layer, stack.layer(index, base.dtype))
        layer.to(device)
    model.routing_handles = []  # type: ignore[assignment]
    set_hooks(model, active=True)
    return model


def set_hooks(model: PreTrainedModel, *, active: bool) -> None:
    """Puts the hooks that compute slot gates and gates into a composed model, or takes them out."""
    routing = routing_of(model)
    handles: Any = model.routing_handles
    for handle in handles:
        handle.remove()
    handles.clear()
    if not active:
        return
    decoder = model.get_submodule(routing.layout.decoder)
    handles.append(decoder.register_forward_pre_hook(routing.begin, with_kwargs=True))
    for index in routing.stack.layers:
        layer: Any = model.get_submodule(f"{routing.layout.layers}.{index}")
        hook = LayerHook(routing, layer.expert_gates, layer.gate_cell)
        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Takes every expert and hook off a composed model, which is an ordinary copy of its base afterwards."""
    routing = routing_of(model)
    set_hooks(model, active=False)
    merged: Any = getattr(model, "merged", None)
    if merged is not None:
        for path, module in merged.modules.items():
            model.set_submodule(path, module)
        del model.merged
    for index in routing.stack.layers:
        layer = model.get_submodule(f"{routing.layout.layers}.{index}")
        for path, module in list(layer.named_modules()):
            if isinstance(module, FusedLinear):
                layer.set_submodule(path, module.base)
        for path, module in list(layer.named_modules()):
            if isinstance(module, GatedMLP):
                layer.set_submodule(path, module.original.train(module.training))
        del layer.expert_gates, layer.expert_groups, layer.gate_cell
    del model.routing, model.routing_handles, model.reading_prompts
    return model


def copy_sharing_parameters(base: PreTrainedModel) -> PreTrainedModel:
    """A structural copy of a model that shares its parameters; buffers and everything else are its own."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def routing_of(model: PreTrainedModel) -> Routing:
    """The routing state of a composed model.

    Raises:
        InputError: The model is not a composed one.
    """
    routing = getattr(model, "routing", None)
    if not isinstance(routing, Routing):
        raise InputError("This model is not composed: it has no experts attached.")
    return routing


@contextmanager
def fixed_slots(model: PreTrainedModel, weights: Mapping[str, float]) -> Iterator[None]:
    """While it is open, the slot gates are these constants (slots not named get 0): the oracle's choice, say.

    Raises:
        InputError: The composition has no slot of such a name, or its experts are merged.
    """
    routing = routing_of(model)
    if getattr(model, "merged", None) is not None:
        raise InputError("The slots of a merged composition are fixed.", fix="call unmerge_experts first")
    for name in weights:
        if name not in routing.stack.names:
            raise InputError(f"There is no slot {name!r}.", fix=f"choose among: {', '.join(routing.stack.names)}")
    before = routing.fixed
    routing.fixed = torch.tensor([float(weights.get(name, 0.0)) for name in routing.stack.names])
    try:
        yield
    finally:
        routing.fixed = before


def trained_bank(model: PreTrainedModel) -> ExpertBank:
    """The trainable bank of a composed model, read back from its modules."""
    routing = routing_of(model)
    if not isinstance(routing.stack, Stack):
        raise InputError("This composition has no bank that trains.")
    before = routing.stack.banks[-1]
    bank = ExpertBank()
    for index, old in before.layers.items():
        layer = model.get_submodule(f"{routing.layout.layers}.{index}")
        gates: LayerGates = layer.expert_gates  # type: ignore[assignment]
        fused: dict[str, Any] = {target: layer.get_submodule(target) for target in old.A}
        bank.layers[index] = LayerExperts(
            experts=old.experts,
            A={target: _kept(module.new_A) for target, module in fused.items()},
            B={target: _kept(module.new_B) for target, module in fused.items()},
            expert_gate=_kept(gates.new_expert_gate),
            rank_gate=None if gates.new_rank_gate is None else _kept(gates.new_rank_gate),
        )
    return bank


def _kept(parameter: Tensor | None) -> Tensor:
    assert parameter is not None
    return parameter.detach().float().cpu().clone()


def _extend_layer(layer: nn.Module, stacked: StackedLayer) -> None:
    """Puts fused modules and gates into one decoder layer."""
    cell, groups = GateCell(), nn.ModuleList()
    if stacked.new is not None:
        for path, mlp in gated_mlps(layer):
            layer.set_submodule(path, GatedMLP(mlp))
    for group in stacked.groups:
        bases = {target: layer.get_submodule(target) for target in group.targets}
        experts, fused = build_group(bases, stacked, group, cell)
        groups.append(experts)
        for target, module in fused.items():
            layer.set_submodule(target, module)
    layer.gate_cell = cell  # type: ignore[assignment]
    layer.expert_groups = groups
    layer.expert_gates = build_gates(stacked).train(layer.training)
