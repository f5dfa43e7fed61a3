"""Attach a stack of banks to a base model, and detach it.

`attach` returns a new model object that shares the memory of the base's weights. The base is never written to, several
composed models can share one base, and several threads can call one composed model. The result is an ordinary
transformers model: `generate`, beam search, padding on either side, the key-value cache and `Trainer.evaluate` work.

The parameters are objects of their own, so `composed.to(...)` leaves the base and other compositions as they are, at
the cost of a copy of the weights; to share them, move or cast the base before composing.
"""

import copy
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...domains.base_model import find_layout
from ...domains.errors import InputError
from ...domains.linear import hidden_tensors, is_quantised
from ..bank import ExpertBank, LayerExperts
from ..router.router import DomainRouter
from .active import SLOT_THRESHOLD
from .base_check import BaseCheck, check_placement
from .composed_model import ComposedModel, composed_class
from .forward_state import StateCarrier
from .fused import FusedLinear
from .gated_mlp import GatedMLP, gated_mlps
from .gates import LayerGates
from .routing import LayerHook, Routing, restore_forwards, route_forwards, routing_of
from .stack import Stack, build_gates, build_group
from .stacked import StackedComposition, StackedLayer


def attach(
    base: PreTrainedModel,
    stack: Stack | StackedComposition,
    *,
    router: DomainRouter | None,
    fixed: Float[Tensor, " slots"] | None = None,
    threshold: float = SLOT_THRESHOLD,
) -> PreTrainedModel:
    """Return a composed model over `base`.

    Args:
        base: The frozen base model; not modified.
        stack: The banks by slot, or a stacked composition read from a file.
        router: Computes the slot gates; may be None if `fixed` is given.
        fixed: Constant slot gates instead of the router's.
        threshold: Slot gates below it are set to zero and the slot is skipped at that position; 0 skips nothing.

    Raises:
        InputError: If there are neither a router nor fixed slot gates, or `base` is composed already.
        IncompatibleError: If the weights of the base are not on one device.
    """
    if router is None and fixed is None:
        raise InputError("A composed model needs a router or fixed slot gates.")
    if isinstance(base, ComposedModel):
        raise InputError("The base model is a composed model.", fix="compose all domains at once: a+b")
    check_placement(base)
    model = copy_sharing_parameters(base)
    model.__class__ = composed_class(type(base))
    if not stack.trainable:
        _freeze(model, base)
    layout = find_layout(model)
    device = next(base.parameters()).device
    routing = Routing(stack, layout, None if router is None else router.to(device), fixed, threshold)
    model.routing = routing  # type: ignore[assignment]
    model.reading_prompts = routing.reading_prompts  # type: ignore[assignment]
    for index in stack.layers:
        layer = model.get_submodule(f"{layout.layers}.{index}")
        _extend_layer(layer, stack.layer(index, base.dtype))
        layer.to(device)
    _check_calls(model, base)
    model.routing_handles = []  # type: ignore[assignment]
    set_hooks(model, active=True)
    return model


def _freeze(model: PreTrainedModel, base: PreTrainedModel) -> None:
    theirs = {id(parameter) for parameter in base.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in theirs:
            parameter.requires_grad_(False)


def _check_calls(model: PreTrainedModel, base: PreTrainedModel) -> None:
    """Install the check of every forward pass."""
    routing = routing_of(model)
    check = BaseCheck(base, model, is_frozen=not routing.stack.trainable)
    check.expect_modules(model, [path for path, part in model.named_modules() if isinstance(part, FusedLinear)])
    model.base_check = check  # type: ignore[assignment]
    decoder = model.get_submodule(routing.layout.decoder)
    model.base_check_handle = decoder.register_forward_pre_hook(check)  # type: ignore[assignment]


def set_hooks(model: PreTrainedModel, *, active: bool) -> None:
    """Install the routed decoder forward and the layer hooks of a composed model, or remove them."""
    routing = routing_of(model)
    decoder = model.get_submodule(routing.layout.decoder)
    handles: Any = model.routing_handles
    for handle in handles:
        handle.remove()
    handles.clear()
    restore_forwards(model)
    for module in decoder.modules():
        carrier = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(carrier, StateCarrier):
            module._gradient_checkpointing_func = carrier.function  # type: ignore[assignment]
    if not active:
        return
    route_forwards(model, routing)
    for index in routing.stack.layers:
        layer: Any = model.get_submodule(f"{routing.layout.layers}.{index}")
        handles.append(layer.register_forward_pre_hook(LayerHook(routing, layer.expert_gates), with_kwargs=True))


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Remove all experts and hooks from a composed model, in place, leaving an ordinary copy of its base."""
    routing = routing_of(model)
    set_hooks(model, active=False)
    handle: Any = model.base_check_handle
    handle.remove()
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
        del layer.expert_gates, layer.expert_groups
    del model.routing, model.routing_handles, model.reading_prompts, model.base_check, model.base_check_handle
    model.__class__ = type(model).__mro__[2]  # that of the base
    return model


def copy_sharing_parameters(base: PreTrainedModel) -> PreTrainedModel:
    """Return a deep copy of a model whose parameters are new objects over the same memory; buffers are copied.

    Quantised weights, whose state is more than one tensor, are the same objects.
    """
    quantised = [module for module in base.modules() if is_quantised(module)]
    shared: list[Tensor] = [parameter for module in quantised for parameter in module.parameters(recurse=False)]
    shared += [tensor for module in quantised for tensor in hidden_tensors(module)]
    others: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        for parameter in base.parameters()
        if type(parameter) is nn.Parameter
    }
    return copy.deepcopy(
        base, {id(p): p for p in base.parameters()} | others | {id(tensor): tensor for tensor in shared}
    )


def trained_bank(model: PreTrainedModel) -> ExpertBank:
    """Return the trainable bank of a composed model with the current values of its parameters.

    Raises:
        InputError: If the composition was read from a file and has no trainable bank.
    """
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
    """Replace the target modules of one decoder layer by fused ones and add its gates."""
    groups, gates = nn.ModuleList(), build_gates(stacked).train(layer.training)
    if stacked.new is not None:
        for path, mlp in gated_mlps(layer):
            layer.set_submodule(path, GatedMLP(mlp))
    for group in stacked.groups:
        bases = {target: layer.get_submodule(target) for target in group.targets}
        experts, fused = build_group(bases, stacked, group, gates)
        groups.append(experts)
        for target, module in fused.items():
            layer.set_submodule(target, module)
    layer.expert_groups = groups
    layer.expert_gates = gates
