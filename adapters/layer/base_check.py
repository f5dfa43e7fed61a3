"""BaseCheck: what must hold of a base model to compose over it, and in each forward pass of a composition.

A composition shares the memory of the base's weights: values that are written to it are seen by both. If a weight or a
module of the base is replaced, the composition would go on with the old one; if a frozen composition were trained, the
base would change for all. Both are refused at the next call.
"""

import copy
from collections.abc import Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...domains.errors import IncompatibleError, InputError


def check_placement(base: PreTrainedModel) -> None:
    """Refuse a base whose weights are not all on one device.

    Raises:
        IncompatibleError: Weights are on several devices, or offloaded to memory or disk.
    """
    found = {str(parameter.device) for parameter in base.parameters()}
    placed = {str(device) for device in (getattr(base, "hf_device_map", None) or {}).values()}
    hooks = [module.__dict__.get("_hf_hook") for module in base.modules()]
    is_offloaded = any(getattr(part, "offload", False) for hook in hooks for part in getattr(hook, "hooks", [hook]))
    if is_offloaded or "meta" in found or "disk" in placed or max(len(found), len(placed)) > 1:
        raise IncompatibleError(
            "The weights of the base model are not on one device.",
            cause=f"they are on {', '.join(sorted(placed or found))}{', offloaded' if is_offloaded else ''}",
            fix="load the base model without device_map: Registry.open(store, device='cuda') (--device cuda)",
        )


class BaseCheck:
    """Forward pre-hook of a composed model's decoder, which compares modules and weights with those at `attach`."""

    def __init__(self, base: PreTrainedModel, composed: PreTrainedModel, *, is_frozen: bool):
        """Remember the modules and weights of the base.

        Args:
            base: The base model.
            composed: The composed model.
            is_frozen: Whether no bank trains.
        """
        self.is_frozen = is_frozen
        self.weights = list(composed.parameters())
        theirs = {id(parameter) for parameter in base.parameters()}
        self.shared = [weight for weight in self.weights if id(weight) in theirs][:1]  # of a quantised base
        self.base, self.extended = _Entries(), _Entries()
        self._merged: list[tuple[Tensor, int]] = []
        for path, module in base.named_modules():
            for table in (module._parameters, module._modules):
                self.base.expect(path, table, table)

    def expect_modules(self, composed: PreTrainedModel, paths: Iterable[str], merged: Iterable[Tensor] = ()) -> None:
        """Remember the modules of the composed model that have experts.

        Args:
            composed: The composed model.
            paths: Their paths.
            merged: Weights that these modules hold merged copies of; they must not be written to.
        """
        self.extended = _Entries()
        for path in paths:
            parent, _, name = path.rpartition(".")
            self.extended.expect(parent, composed.get_submodule(parent)._modules, [name])
            inner = composed.get_submodule(path)._modules
            self.extended.expect(path, inner, inner)
        # tensors of inference mode count no versions
        self._merged = [(weight, weight._version) for weight in merged if not weight.is_inference()]

    def __deepcopy__(self, memo: dict[int, Any]) -> "BaseCheck":
        """Return the check of a copied model, which has its own weights, whatever becomes of the base."""
        twin = BaseCheck.__new__(BaseCheck)
        memo[id(self)] = twin
        twin.base = _Entries()
        twin.__dict__ |= {name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "base"}
        return twin

    def __call__(self, decoder: nn.Module, _args: Any) -> None:
        """Check the model that is called.

        Raises:
            IncompatibleError: A weight or module was replaced after `attach`.
            InputError: A frozen composition is called in training.
        """
        if torch.compiler.is_compiling():
            return
        if not (self.base.hold() and self.extended.hold()):
            name = next(iter([*self.base.changed(), *self.extended.changed()]))
            raise _replaced(f"{name} is another object than when the model was composed")
        if any(weight._version != version for weight, version in self._merged):
            raise _replaced("a weight of the base was written to after the experts were merged")
        if self.is_frozen and torch.is_grad_enabled():
            self._check_not_training(decoder)

    def _check_not_training(self, decoder: nn.Module) -> None:
        if decoder.training or any(weight.requires_grad for weight in self.weights):
            raise InputError(
                "The experts of this composition are frozen.",
                cause="it is in training mode" if decoder.training else "weights of its base require gradients",
                fix="registry add-domain and registry retrain train experts; to compute only, call model.eval()",
            )


class _Entries:
    """Entries of dictionaries of modules, with the objects expected there."""

    def __init__(self) -> None:
        self.tables: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.objects: list[Any] = []
        self.names: list[str] = []

    def expect(self, path: str, table: dict[str, Any], keys: Iterable[str]) -> None:
        for key in keys:
            self.tables.append(table)
            self.keys.append(key)
            self.objects.append(table[key])
            self.names.append(f"{path}.{key}".lstrip("."))

    def hold(self) -> bool:
        # without a loop in Python: hundreds of entries in every step
        return all(map(is_, map(dict.get, self.tables, self.keys), self.objects))

    def changed(self) -> list[str]:
        found = map(dict.get, self.tables, self.keys)
        return [name for name, now, then in zip(self.names, found, self.objects, strict=True) if now is not then]


def _replaced(cause: str) -> IncompatibleError:
    return IncompatibleError(
        "The base model was changed after this model was composed.",
        cause=cause,
        fix="compose it again over the changed base model",
    )
