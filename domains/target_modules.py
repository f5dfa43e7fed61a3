"""Find the linear modules that experts can extend, layer by layer, and say why others cannot be extended.

A FusedLinear adds its experts' update when it is called, position by position, with the gates of its decoder layer. So
a linear module is a target only if

- it is called, and nothing reads its `weight` instead, as fused kernels of state-space layers do;
- it takes and returns one tensor, and does not route a base model's own experts;
- it belongs to one decoder layer, and is called with the same positions as this layer, in the same order.

Reads of weights are found in the source of the modules around it. Everything else is observed while two short texts,
which differ in their last token, are generated from: a prefill, and one step with the key-value cache.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .base_model import DECODER_ONLY, ModelLayout, first_tensor, for_this_thread
from .errors import IncompatibleError, InputError
from .linear import linear_modules

PROBE_TOKENS = 6  # of each of the two texts

READ = "its weight is read without calling it, so experts on it would have no effect"
ROUTER = "it routes the base model's own experts"
SHARED = "several decoder layers share it"
UNCALLED = "it is not called, or not for every text"
ARGUMENTS = "it takes or returns more than one tensor"
SKIPPED = "its decoder layer computes some positions only"
POSITIONS = "it is called with other positions than its decoder layer"

_WEIGHT_READ = re.compile(r"\b(\w+)\.weight\b(?!\s*\.\s*(?:dtype|device|shape|size|ndim|dim)\b)")
_ROUTER_NAME = re.compile(r"(?:^|_)(?:router|gate|gating|wg)$")


@dataclass(frozen=True)
class Targets:
    """Linear modules of the decoder layers, by path relative to their layer."""

    model: str  # class name, for messages
    by_layer: tuple[tuple[str, ...], ...]
    excluded: Mapping[str, str]  # reasons why modules cannot be extended, by path; of the first layer that has it
    share: float  # of the decoder layers' weights that belong to targets

    def choose(self, names: Sequence[str] | None = None) -> tuple[tuple[str, ...], ...]:
        """Return the targets of each layer, all of them or those in `names`, as PEFT's `target_modules` does.

        Args:
            names: Last parts of module paths (`q_proj`, `c_attn`).

        Raises:
            InputError: No target has one of the names.
        """
        if names is None:
            return self.by_layer
        known = sorted({_name(path) for layer in self.by_layer for path in layer})
        unknown = [name for name in names if name not in known]
        if unknown:
            reasons = [reason for path, reason in self.excluded.items() if _name(path) == unknown[0]]
            raise InputError(
                f"{unknown[0]!r} of {self.model} cannot have experts."
                if reasons
                else f"There is no target module named {unknown[0]!r} in {self.model}.",
                cause=reasons[0] if reasons else None,
                fix=f"choose among: {', '.join(known)}",
            )
        return tuple(tuple(path for path in layer if _name(path) in names) for layer in self.by_layer)


def find_targets(model: PreTrainedModel, layout: ModelLayout) -> Targets:
    """Find the targets of each decoder layer by two short forward passes.

    Raises:
        IncompatibleError: The model is not causal, keeps its state outside a Cache, passes other hidden states between
            its layers than one for each token, or has no target at all.
    """
    layers: Any = model.get_submodule(layout.layers)
    modules = {(i, path): layer.get_submodule(path) for i, layer in enumerate(layers) for path in linear_modules(layer)}
    observed = _Observer(model, layout, modules).observe()
    reasons = {key: reason for key, reason in observed.items() if reason} | reasons_in_code(model, layout, modules)
    # which tokens an expert of the base model gets depends on the text: one that got all is no exception
    partial = {_pattern(path) for (_, path), reason in reasons.items() if reason in (UNCALLED, POSITIONS)}
    by_layer: list[list[str]] = [[] for _ in layers]
    excluded: dict[str, str] = {}
    for layer, path in modules:
        reason = reasons.get((layer, path))
        if reason is None and re.search(r"\d", path) and _pattern(path) in partial:
            reason = POSITIONS
        if reason is None:
            by_layer[layer].append(path)
        else:
            excluded.setdefault(path, reason)
    found: list[Any] = [modules[i, path] for i, paths in enumerate(by_layer) for path in paths]
    if not found:
        raise IncompatibleError(
            f"No linear module of {type(model).__name__} can have experts.",
            cause="; ".join(f"{path}: {reason}" for path, reason in list(excluded.items())[:3]) or "it has none",
            fix="use another base model",
        )
    total = sum(parameter.numel() for parameter in layers.parameters())
    weights = {id(module.weight): module.weight.numel() for module in found}  # several modules can be tied
    share = sum(weights.values()) / total
    return Targets(type(model).__name__, tuple(map(tuple, by_layer)), excluded, share)


# --- the model's code ---


def reasons_in_code(
    model: PreTrainedModel, layout: ModelLayout, modules: Mapping[tuple[int, str], nn.Module]
) -> dict[tuple[int, str], str]:
    """Return the reasons against modules as targets that the model's code shows, without a forward pass.

    Args:
        modules: Linear modules by decoder layer and path inside it.
    """
    layers: Any = model.get_submodule(layout.layers)
    owners: dict[int, set[int]] = {}
    for index, layer in enumerate(layers):
        for module in layer.modules():
            owners.setdefault(id(module), set()).add(index)
    found = {}
    for (index, path), module in modules.items():
        around = list(_ancestors(layers[index], path))
        if len(owners[id(module)]) > 1:
            found[index, path] = SHARED
        elif any(_name(path) in _weights_read(type(parent)) for parent in around if not _is_exact_only(parent)):
            found[index, path] = READ
        elif any(
            _ROUTER_NAME.search(part) and _has_experts(holder)
            for part, holder in zip(path.split("."), around, strict=True)
        ):
            found[index, path] = ROUTER
    return found


def _ancestors(layer: nn.Module, path: str) -> Iterator[nn.Module]:
    """Yield the modules that contain the one at `path`, outermost first."""
    yield layer
    for part in path.split(".")[:-1]:
        layer = layer.get_submodule(part)
        yield layer


@cache
def _weights_read(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of submodules whose weight a class reads outside its initialization."""
    found: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for name, function in vars(base).items():
            if inspect.isfunction(function) and not re.match(r"__init__|_?(init|reset)_", name):
                try:
                    source = inspect.getsource(function)
                except (OSError, TypeError):  # no source: FusedLinear.weight guards it
                    continue
                found |= set(_WEIGHT_READ.findall(source))
    return frozenset(found)


def _is_exact_only(module: nn.Module) -> bool:
    """Return whether a module of BLOOM reads weights only in a mode that is off."""
    return getattr(module, "slow_but_exact", True) is False


def _has_experts(module: nn.Module) -> bool:
    """Return whether a module holds routed experts: by name, or as parameters with an axis of experts."""
    return any(
        ("experts" in name and "shared" not in name) or any(p.ndim == 3 for p in child.parameters(recurse=False))
        for name, child in module.named_children()
    )


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "*", path)


def _name(path: str) -> str:
    return path.rpartition(".")[2]


# --- one short generation ---


class _Observer:
    """Hooks on a model's decoder layers and linear modules during one short generation."""

    def __init__(self, model: PreTrainedModel, layout: ModelLayout, modules: Mapping[tuple[int, str], nn.Module]):
        self.model: Any = model
        self.layout, self.modules = layout, modules
        self.layers: Any = model.get_submodule(layout.layers)
        self.reasons: dict[tuple[int, str], str | None] = dict.fromkeys(modules, UNCALLED)
        self.positions = 0  # of the forward pass that is running
        self.steps = 0
        self.skipping: set[nn.Module] = set()

    def observe(self) -> dict[tuple[int, str], str | None]:
        """Return the reason against each module, None for a target."""
        ids = probe_ids(self.model)
        with ExitStack() as hooks, torch.no_grad():
            decoder = self.model.get_submodule(self.layout.decoder)
            before, check = for_this_thread(self._check_decoder), for_this_thread(self._check_layer)
            hooks.enter_context(_removed(decoder.register_forward_pre_hook(before, with_kwargs=True)))
            for layer in self.layers:
                hooks.enter_context(_removed(layer.register_forward_pre_hook(check, with_kwargs=True)))
            last = self.layers[-1].register_forward_hook(for_this_thread(self._check_output))
            hooks.enter_context(_removed(last))
            for key, module in self.modules.items():
                hook = for_this_thread(partial(self._check, key))
                hooks.enter_context(_removed(module.register_forward_hook(hook, with_kwargs=True)))
            self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=torch.ones_like(ids).to(self.model.device),
                max_new_tokens=2,
                min_new_tokens=2,
                do_sample=False,
                num_beams=1,
            )
        return {key: SKIPPED if self.layers[key[0]] in self.skipping else why for key, why in self.reasons.items()}

    def _check_decoder(self, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Count the forward passes, and refuse state of earlier ones that is kept outside a Cache."""
        given = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        self.positions = next(value for value in given if isinstance(value, Tensor)).shape[1]
        self.steps += 1
        if self.steps > 1 and self.positions < PROBE_TOKENS and not _has_cache(args, kwargs):
            raise IncompatibleError(
                f"{type(self.model).__name__} cannot be composed.",
                cause="it keeps what it read in another form than the layers of a Cache, where routing has no place",
                fix=DECODER_ONLY,
            )

    def _check_layer(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Refuse hidden states other than one vector for each token; note layers that skip positions."""
        hidden = first_tensor(args, kwargs)
        found, expected = tuple(hidden.shape), (2, self.positions, self.layout.width)
        if found[:1] + found[2:] != expected[:1] + expected[2:]:
            raise IncompatibleError(
                f"{type(self.model).__name__} cannot have experts.",
                cause=f"its decoder layers are given hidden states of shape {found} instead of {expected}",
                fix=DECODER_ONLY,
            )
        if found != expected:
            self.skipping.add(layer)
        else:
            self._check_causal(hidden)

    def _check_output(self, _layer: nn.Module, _args: tuple, output: Any) -> None:
        self._check_causal(output if isinstance(output, Tensor) else output[0])

    def _check_causal(self, hidden: Tensor) -> None:
        """Refuse a model in which earlier positions depend on the last token, the only one that differs."""
        if self.steps == 1 and hidden.shape[1] == PROBE_TOKENS and _leaks(hidden):
            raise IncompatibleError(
                f"{type(self.model).__name__} is no causal language model as it is configured.",
                cause="what it computes for a token depends on later tokens",
                fix=DECODER_ONLY,
            )

    def _check(self, key: tuple[int, str], _module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Note the reason against a module, from one of its calls."""
        if self.reasons[key] not in (None, UNCALLED):
            return
        if len(args) != 1 or kwargs or not isinstance(output, Tensor):
            self.reasons[key] = ARGUMENTS
        elif self._has_other_positions(args[0]):
            self.reasons[key] = POSITIONS
        else:
            self.reasons[key] = None

    def _has_other_positions(self, x: Tensor) -> bool:
        if x.shape[:-1] not in ((2, self.positions), (2 * self.positions,)):
            return True
        return self.steps == 1 and _leaks(x.reshape(2, self.positions, -1))


def _has_cache(args: tuple, kwargs: dict) -> bool:
    """Return whether there is a Cache among the arguments, one that keeps nothing beside its layers."""
    return any(isinstance(value, Cache) and type(value).__len__ is Cache.__len__ for value in [*args, *kwargs.values()])


def _leaks(x: Float[Tensor, "2 tokens width"]) -> bool:
    """Return whether two texts differ before their last position, by more than rounding."""
    difference = (x[0].float() - x[1].float()).abs().amax(-1)
    tolerance = torch.finfo(x.dtype).eps ** 0.5 if x.is_floating_point() else 0.0
    return bool(difference[:-1].max() > tolerance * difference[-1])


def probe_ids(model: PreTrainedModel) -> Int64[Tensor, "2 tokens"]:
    """Return two texts that differ in their last token, without tokens that have a role of their own."""
    config = model.config.get_text_config(decoder=True)
    special = set(_token_ids(model.config.to_dict()))
    ordinary = [token for token in range(config.vocab_size) if token not in special]
    chosen = ordinary[min(len(ordinary) // 2, len(ordinary) - PROBE_TOKENS - 1) :]
    return torch.tensor([chosen[:PROBE_TOKENS], [*chosen[: PROBE_TOKENS - 1], chosen[PROBE_TOKENS]]])


def _token_ids(values: Mapping[str, Any]) -> Iterator[int]:
    """Yield the ids of tokens with a role of their own (padding, images) from a config."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _token_ids(value)
        elif "token" in str(name):
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))


@contextmanager
def _removed(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
