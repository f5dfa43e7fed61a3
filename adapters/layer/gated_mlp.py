"""GatedMLP: down(act(gate(x)) * up(x)) in training, keeping what gate and up gave and neither of the two products.

Autograd would keep four tensors of the inner width for each MLP: the outputs of gate and up, the activation and the
product (which is the input of down). The last two are cheap functions of the first two, so they are computed again in
the backward pass: a quarter of everything that a Llama keeps, for two passes over memory. `GroupUpdate` of the down
module asks for its input again instead of keeping it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHILDREN = {"gate_proj", "up_proj", "down_proj", "act_fn"}  # what the MLPs of most families are made of


class GatedMLP(nn.Module):
    """Stands for an MLP of this form in a model that trains; its modules are the MLP's own, under the same names."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module
    original: nn.Module

    def __init__(self, original: nn.Module):
        """Takes the modules of `original`, which is kept as it is for the time after training."""
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        # no submodule: its parameters are here already
        object.__setattr__(self, "original", original)

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        """The same numbers as the MLP's own forward."""
        return self.down_proj(gated_product(self.act_fn, self.gate_proj(x), self.up_proj(x)))


def gated_mlps(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The MLPs of a decoder layer that a GatedMLP may stand for, by path.

    Judged by what they compute: an MLP of this make is tried on one token, in training mode so that dropout would show.
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
    """Act(gate) * up, of which only gate and up are kept for the backward pass."""
    # torch.compile decides by itself what it computes again
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not (gate.requires_grad or up.requires_grad):
        return act(gate) * up
    return _GatedProduct.apply(act, gate, up)  # type: ignore[return-value]


def product_of(x: Tensor) -> Any:
    """The step of autograd that made x, if it is a gated product, which can be had again; else None."""
    if torch.compiler.is_compiling():
        return None
    return x.grad_fn if getattr(x.grad_fn, "is_gated_product", False) else None


def product_again(step: Any) -> Float[Tensor, "*tokens inner"]:
    """The gated product once more, in the backward pass; what it needed is left for the step's own backward pass."""
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
    """Gate, up, and act(gate) as a function of gate. Unpacks what is kept: once in a backward pass is allowed."""
    gate, up = step.saved_tensors
    gate = gate.detach().requires_grad_()
    return gate, up.detach(), step.act(gate)
