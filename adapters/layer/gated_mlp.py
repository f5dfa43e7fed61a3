"""GatedMLP: down(act(gate(x)) * up(x)) that saves only the outputs of gate and up for the backward pass.

Autograd would save four tensors of the inner width for each MLP: the outputs of gate and up, the activation and the
product (the input of down). The last two are cheap functions of the first two, so the backward pass recomputes them.
This saves a quarter of a Llama's activation memory for two passes over memory. `GroupUpdate` of the down module
recomputes its input instead of saving it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHILDREN = {"gate_proj", "up_proj", "down_proj", "act_fn"}  # the modules of a gated MLP in most model families


class GatedMLP(nn.Module):
    """Replacement of a gated MLP in training, with the MLP's own modules under the same names."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module
    original: nn.Module

    def __init__(self, original: nn.Module):
        """Share the modules of `original`, which `detach` puts back."""
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        # not registered as a submodule: its parameters already are
        object.__setattr__(self, "original", original)

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        """Return the output of the original MLP, bit for bit."""
        return self.down_proj(gated_product(self.act_fn, self.gate_proj(x), self.up_proj(x)))


def gated_mlps(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the path and module of each MLP of a decoder layer that a GatedMLP can replace.

    Each candidate is run on one token and compared with the formula, in training mode so that dropout would show.
    """
    for path, module in list(layer.named_modules()):
        if {name for name, _ in module.named_children()} == CHILDREN and _is_gated(module):
            yield path, module


@torch.no_grad()
def _is_gated(mlp: Any) -> bool:
    linears = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    has_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in mlp.modules())
    if has_hooks or any(type(module) is not nn.Linear for module in linears) or list(mlp.act_fn.parameters()):
        return False
    weight, was_training = mlp.gate_proj.weight, mlp.training
    x = torch.linspace(-1, 1, mlp.gate_proj.in_features, device=weight.device, dtype=weight.dtype)[None]
    try:
        found = mlp.train()(x)
    finally:
        mlp.train(was_training)
    return torch.equal(found, mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))


def gated_product(
    act: Callable[[Tensor], Tensor], gate: Float[Tensor, "*tokens inner"], up: Float[Tensor, "*tokens inner"]
) -> Float[Tensor, "*tokens inner"]:
    """Return act(gate) * up, saving only gate and up for the backward pass."""
    # torch.compile makes its own choice of what to recompute
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not (gate.requires_grad or up.requires_grad):
        return act(gate) * up
    return _GatedProduct.apply(act, gate, up)  # type: ignore[return-value]


def product_of(x: Tensor) -> Any:
    """Return the autograd node that produced x if it is a gated product, which can be recomputed; else None."""
    if torch.compiler.is_compiling():
        return None
    return x.grad_fn if getattr(x.grad_fn, "is_gated_product", False) else None


def product_again(step: Any) -> Float[Tensor, "*tokens inner"]:
    """Recompute a gated product in the backward pass; intermediates are cached for the node's own backward."""
    gate, up, activation = step.again = _activated(step)
    return activation.detach() * up


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, act, gate, up):  # noqa: D102
        ctx.act, ctx.again, ctx.is_gated_product = act, None, True
        ctx.save_for_backward(gate, up)
        return act(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up, activation = ctx.again or _activated(ctx)
        ctx.again = None
        grad_up = grad * activation.detach()
        (grad_gate,) = torch.autograd.grad(activation, gate, grad * up)
        return None, grad_gate, grad_up


@torch.enable_grad()
def _activated(step: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return gate, up and act(gate), differentiable in gate; unpacks the saved tensors, once in each backward pass."""
    gate, up = step.saved_tensors
    gate = gate.detach().requires_grad_()
    return gate, up.detach(), step.act(gate)
