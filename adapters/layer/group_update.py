"""GroupUpdate: the fused layer as one autograd function, for all modules that read the same input."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.dispatch import choose_kernels
from .gated_mlp import product_again, product_of


class GroupUpdate(torch.autograd.Function):
    """y_m + B_m (g * (A_m x)) with gradients for x, the outputs, the gates and the trainable experts only.

    No matrix product is spent on weight gradients of frozen experts. Only x and rank-sized activations are saved for
    the backward pass (x is recomputed instead if it is a gated product), which concatenates the weights of frozen and
    trainable experts again. Plain Linear base modules run inside, so that the gradient of x is summed in place.
    """

    @staticmethod
    def forward(ctx, group, places, x, gates, *rest):  # noqa: D102
        given, trained = rest[: len(places)], rest[len(places) :]
        members = [group.members[place] for place in places]
        ctx.is_inside = given[0] is None
        dtype = x.dtype if ctx.is_inside else given[0].dtype
        flat, gate = x.reshape(-1, x.shape[-1]).to(dtype), gates.reshape(-1, gates.shape[-1])
        weights, kernels = group.weights(places, dtype), choose_kernels(x.device)
        if ctx.is_inside:
            linears = [(member.base.weight, member.base.bias) for member in members]
            found, low = kernels.outputs(flat, linears, gate, weights, keep=True)
            # like F.linear: autograd must not see views, which it would not allow to be modified in place
            outputs = [torch.ops.aten._unsafe_view(output, [*x.shape[:-1], output.shape[-1]]) for output in found]
        else:
            outputs = [output.clone(memory_format=torch.contiguous_format) for output in given]
            low = kernels.update_(
                flat, [output.view(-1, output.shape[-1]) for output in outputs], gate, weights, keep=True
            )
        ctx.product = product_of(x)
        ctx.save_for_backward(flat if ctx.product is None else None, low, gate, *trained)
        ctx.group, ctx.places = group, places
        ctx.x_shape, ctx.x_type, ctx.gates_shape = x.shape, x.dtype, gates.shape
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        flat, low, gate, *_trained = ctx.saved_tensors
        if flat is None:
            flat = product_again(ctx.product).reshape(len(low), -1).to(low.dtype)
        group, members = ctx.group, [ctx.group.members[place] for place in ctx.places]
        needs = ctx.needs_input_grad
        flat_grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        has_trained = any(needs[4 + len(members) :])
        found = choose_kernels(flat.device).gradients(
            flat_grads,
            flat,
            low,
            gate,
            group.weights(ctx.places, flat.dtype),
            trainable=[group.trainable[place] if has_trained else 0 for place in ctx.places],
            needs_x_grad=needs[2],
            needs_gates_grad=needs[3],
        )
        if found.x is not None and ctx.is_inside:
            for grad, member in zip(flat_grads, members, strict=True):
                found.x.addmm_(grad, member.base.weight)
        grad_trained: list[Tensor | None] = []
        for member, grad_A, grad_Bt in zip(members, found.A, found.Bt, strict=True):
            if member.new_A is not None:
                grad_trained += [grad_A.float(), grad_Bt.t().float() * member.new_scale] if has_trained else [None] * 2
        return (
            None,
            None,
            None if found.x is None else found.x.to(ctx.x_type).view(ctx.x_shape),
            None if found.gates is None else found.gates.view(ctx.gates_shape),
            *(grads if not ctx.is_inside else [None] * len(members)),
            *grad_trained,
        )
