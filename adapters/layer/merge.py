"""Merge experts with constant gates into copies of the base weights, and undo it.

    W' = W + sum over ranks of g[rank] B[:, rank] A[rank, :]

The products B A are summed, never the factors. The base's parameters are shared by all models composed over it and are
never written to: each merged module is a new module with its own weight, as large as the base's. The fused module is
kept, so that unmerging restores it bit for bit.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...domains.errors import IncompatibleError, InputError
from ...domains.linear import is_quantised
from .attach import set_hooks
from .fused import FusedLinear
from .routing import routing_of

_PROBED_SIZES = (1e-3, 1.0, 30.0)  # of the vectors on which an unknown linear module is tried


@dataclass(frozen=True)
class Merged:
    """Modules that were replaced while a model is merged; `model.merged`."""

    modules: dict[str, FusedLinear]  # by path
    slot_gate: Float[Tensor, " slots"]  # with which they were merged

    @property
    def extra_bytes(self) -> int:
        """Memory of the merged weights, in addition to the base's."""
        weights: list[Any] = [module.base.weight for module in self.modules.values()]
        return sum(weight.nbytes for weight in weights)


@torch.no_grad()
def merge_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Merge the experts of a static composition into copies of the base weights, so that it runs as fast as the base.

    Router and gates are inactive until `unmerge_experts`. Slot gates set by `fixed_slots` are used if it is open.

    Raises:
        InputError: If the gates depend on the text, or the model is merged already.
        IncompatibleError: If a module of the base model is not W x + b with an ordinary W.
    """
    routing = routing_of(model)
    if getattr(model, "merged", None) is not None:
        raise InputError("The experts are merged already.", fix="call unmerge_experts first")
    fixed = routing.fixed_here
    if fixed is None or not routing.stack.static or routing.stack.trainable:
        raise InputError(
            "Only constant gates can be merged.",
            cause="the gates of this composition depend on the text",
            fix="compose it with static=True (--static), which uses the experts' mean gates",
        )
    found = {path: module for path, module in model.named_modules() if isinstance(module, FusedLinear)}
    for path, module in found.items():
        _check_mergeable(module.base, path)
    merged: dict[str, nn.Module] = {}
    for index in routing.stack.layers:
        layer: Any = model.get_submodule(f"{routing.layout.layers}.{index}")
        gate = layer.expert_gates.constant_gate(fixed)
        for group in layer.expert_groups:
            for path, module in zip(*_members_in(found, group.members), strict=True):
                merged[path] = _merged_module(module, group, gate)
                _check_mergeable(merged[path], path)
    for path, module in merged.items():
        model.set_submodule(path, module)
    set_hooks(model, active=False)
    model.merged = Merged(found, fixed)  # type: ignore[assignment]
    check: Any = model.base_check
    bases: list[Any] = [module.base for module in found.values()]
    check.expect_modules(model, found, merged=[base.weight for base in bases])
    return model


def unmerge_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `merge_experts`: restore the fused modules over the base's own weights, bit for bit.

    Raises:
        InputError: If the experts are not merged.
    """
    merged = getattr(model, "merged", None)
    if not isinstance(merged, Merged):
        raise InputError("The experts of this model are not merged.")
    for path, module in merged.modules.items():
        model.set_submodule(path, module)
    check: Any = model.base_check
    check.expect_modules(model, merged.modules)
    del model.merged
    set_hooks(model, active=True)
    return model


def _members_in(
    found: dict[str, FusedLinear], members: Sequence[FusedLinear]
) -> tuple[list[str], Sequence[FusedLinear]]:
    path_of = {id(module): path for path, module in found.items()}
    return [path_of[id(member)] for member in members], members


def _merged_module(module: FusedLinear, group: Any, gate: Float[Tensor, " rank"]) -> nn.Module:
    """Return a copy of the base's module with the merged weight; the bias is shared."""
    base: Any = module.base
    weights = group.weights((module.place,), base.weight.dtype)
    by_column = gate if weights.columns is None else gate[weights.columns]
    weight = merged_weight(base.weight, weights.A, weights.Bt[0], by_column, transposed=isinstance(base, Conv1D))
    merged: Any = copy.copy(base)
    merged._parameters = dict(base._parameters)
    merged.__dict__.pop("forward", None)  # bound to the base's module
    merged.weight = nn.Parameter(weight, requires_grad=False)
    return merged


def _check_mergeable(module: nn.Module, path: str) -> None:
    """Raise unless a module computes W x + b: by its class, or on vectors of several sizes.

    Subclasses of nn.Linear may do the same in another order (Falcon's), or something else (clamp, return a tuple).

    Raises:
        IncompatibleError: It computes something else, or its weight is quantised.
    """
    if is_quantised(module) or not isinstance(module._parameters.get("weight"), nn.Parameter):
        cause = f"it is a {type(module).__name__} with a quantised weight, which a sum would round once more"
        raise _not_mergeable(path, cause)
    if type(module) in (nn.Linear, Conv1D) and not _is_changed(module):
        return
    if not _is_affine(module):
        raise _not_mergeable(path, f"it is a {type(module).__name__}, which computes other outputs than W x + b")


def _is_affine(linear: Any) -> bool:
    """Return whether a module gives W x + b, up to rounding, for vectors of several sizes."""
    weight, bias = linear.weight.t() if isinstance(linear, Conv1D) else linear.weight, linear.bias
    x = torch.randn(len(_PROBED_SIZES), weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = (x * torch.tensor(_PROBED_SIZES)[:, None]).to(weight)
    found, expected = linear(x), F.linear(x, weight, bias)
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    size = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    return bool(((found - expected).abs() <= 4 * torch.finfo(weight.dtype).eps * size).all())


def _is_changed(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__


def _not_mergeable(path: str, cause: str) -> IncompatibleError:
    return IncompatibleError(
        f"{path} cannot be merged.", cause=cause, fix="leave the experts beside it, or export with --to peft"
    )


def merged_weight(
    weight: Float[Tensor, "rows columns"],
    A: Float[Tensor, "rank d_in"],
    Bt: Float[Tensor, "rank d_out"],
    gate: Float[Tensor, " rank"],
    *,
    transposed: bool = False,
) -> Float[Tensor, "rows columns"]:
    """Return W + B diag(g) A in new memory, summed in float32 and rounded once.

    Args:
        weight: W, of shape (d_out, d_in), or (d_in, d_out) if transposed.
        A: A of all experts.
        Bt: B of all experts, transposed, scales folded in.
        gate: One gate for each rank.
        transposed: Whether `weight` has Conv1D's layout.
    """
    left, right = (A, Bt) if transposed else (Bt, A)
    if weight.dtype == torch.float32:
        return torch.addmm(weight, (left * gate[:, None]).t(), right)
    product = (left.float() * gate[:, None]).t() @ right.float()
    return (weight.float() + product).to(weight.dtype)
