"""The tensors of a saved PEFT adapter as a bank of one expert, exactly, over the base model that they were made for.

An expert has one rank and one alpha. Where the modules of an adapter agree on both, its matrices stay as they are.
Elsewhere they get rows of zeros up to the largest rank, and each B takes its own scale in, once, in float32. The expert
gate is 1 because there is one expert, and there are no rank gates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters.bank import Expert, ExpertBank, LayerExperts
from ...domains.base_model import ModelLayout, linear_modules, linear_shape
from ...domains.errors import IncompatibleError, IntegrityError
from .peft_reader import AdapterConfig, ModuleRules

PREFIX: Final = "base_model.model."
NUMBERS: Final = (torch.float32, torch.float16, torch.bfloat16)
MAX_NAMED: Final = 3  # names in an error

# parts of names of tensors that are not A or B, and what they are
_OTHER_TENSORS: Final = {
    "lora_embedding_": "LoRA of an embedding",
    "lora_magnitude_vector": "the magnitude of DoRA",
    "modules_to_save": "a saved module",
    "token_adapter": "trained tokens",
    ".bias": "a bias",
}

_OF_TRAINING: Final = (".lora_velora_embed",)  # tensors that only a backward pass reads


@dataclass(frozen=True, kw_only=True)
class _Module:
    """A linear module that the adapter extends."""

    path: str
    layer: int
    target: str  # its path inside the decoder layer
    rank: int
    alpha: float
    scale: float
    shape: tuple[int, int]  # d_in, d_out


def bank_of_adapter(
    tensors: Mapping[str, Tensor], config: AdapterConfig, model: PreTrainedModel, layout: ModelLayout, *, source: str
) -> ExpertBank:
    """The adapter as a bank; under gate 1 it computes what PEFT computes.

    Raises:
        IncompatibleError: It extends modules that are not linear modules of a decoder layer, or has other widths.
        IntegrityError: Tensors are missing, are too many, have another rank than the config says or change nothing.
    """
    modules = _modules_of(config, model, layout, source)
    pairs = _pairs_of(tensors, modules, source)
    expert, is_folded = _one_expert(config, modules)
    bank = ExpertBank()
    for module in sorted(modules, key=lambda module: module.layer):
        A, B = pairs[module.path]
        if is_folded:
            B = B.float() * module.scale
        missing = expert.rank - module.rank
        layer = bank.layers.setdefault(
            module.layer,
            LayerExperts(
                experts=(expert,), A={}, B={}, expert_gate=torch.zeros(1, layout.width), rank_gate=None, mean_gate=None
            ),
        )
        layer.A[module.target] = F.pad(A, (0, 0, 0, missing))
        layer.B[module.target] = F.pad(B, (0, missing))
    return bank


def _modules_of(config: AdapterConfig, model: PreTrainedModel, layout: ModelLayout, source: str) -> list[_Module]:
    rules = ModuleRules(config)
    named = {path: module for path, module in model.named_modules() if path}
    output = model.get_output_embeddings()
    linear = [path for path in linear_modules(model) if named[path] is not output]
    places = {
        f"{layout.layers}.{index}.{target}": (index, target)
        for index in range(layout.count)
        for target in linear_modules(named[f"{layout.layers}.{index}"])
    }
    chosen = rules.chosen(named, linear=linear)
    if not chosen:
        raise IncompatibleError(
            f"{source}: this adapter extends no module of {type(model).__name__}.",
            cause=f"its target_modules are {_short(config.targets)}",
            fix="give an adapter of this base model",
        )
    outside = [path for path in chosen if path not in places]
    if outside:
        raise IncompatibleError(
            f"{source}: this adapter cannot be imported.",
            cause=f"it extends {outside[0]}, a {type(named[outside[0]]).__name__}; experts extend the linear modules of"
            " decoder layers, because all else is shared by every domain",
        )
    return [
        _Module(
            path=path,
            layer=places[path][0],
            target=places[path][1],
            rank=rules.rank(path),
            alpha=rules.alpha(path),
            scale=rules.scale(path),
            shape=linear_shape(named[path]),
        )
        for path in chosen
    ]


def _pairs_of(tensors: Mapping[str, Tensor], modules: list[_Module], source: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every module, checked."""
    wanted = {_key(module, letter) for module in modules for letter in "AB"}
    extra = sorted(name for name in tensors.keys() - wanted if not name.endswith(_OF_TRAINING))
    missing = sorted(wanted - tensors.keys())
    if extra:
        raise _damaged(source, f"{len(extra)} tensors that its config does not explain", extra, _kind_of(extra[0]))
    if missing:
        raise _damaged(source, f"{len(missing)} tensors of its config are missing", missing, "")
    pairs = {}
    for module in modules:
        A, B = tensors[_key(module, "A")], tensors[_key(module, "B")]
        _check_pair(A, B, module, source)
        pairs[module.path] = A, B
    if not any(B.any() and A.any() for A, B in pairs.values()):
        raise IntegrityError(
            f"{source}: this adapter changes nothing.",
            cause=f"every product B A of its {len(pairs)} modules is zero: it was not trained, or not saved rightly",
        )
    return pairs


def _check_pair(A: Tensor, B: Tensor, module: _Module, source: str) -> None:
    for letter, matrix in (("A", A), ("B", B)):
        if matrix.dtype not in NUMBERS:
            cause = (
                f"{_key(module, letter)} has numbers of type {matrix.dtype}; {', '.join(map(str, NUMBERS))} are read"
            )
            raise IncompatibleError(f"{source}: this adapter cannot be imported.", cause=cause)
    d_in, d_out = module.shape
    ranks = A.shape[0] if A.ndim == 2 else None, B.shape[1] if B.ndim == 2 else None
    if ranks != (module.rank, module.rank):
        cause = f"{module.path}: the config says rank {module.rank}, A is {tuple(A.shape)}, B is {tuple(B.shape)}"
        raise IntegrityError(f"{source}: its tensors do not fit its config.", cause=cause)
    if (A.shape[1], B.shape[0]) != (d_in, d_out):
        raise IncompatibleError(
            f"{source} was made for another base model.",
            cause=f"{module.path} takes {d_in} numbers and gives {d_out} here; in the adapter"
            f" {A.shape[1]} and {B.shape[0]}",
            fix="give the adapter of this base model, or make a registry for its own: registry init --base MODEL",
        )


def _one_expert(config: AdapterConfig, modules: list[_Module]) -> tuple[Expert, bool]:
    """The expert that stands for all modules, and whether each B takes its scale in."""
    first = modules[0]
    rank = max(module.rank for module in modules)
    if first.alpha > 0 and all((m.rank, m.alpha) == (rank, first.alpha) for m in modules):
        return Expert(id="e0", rank=rank, alpha=first.alpha, method="rslora" if config.is_rslora else "lora"), False
    return Expert(id="e0", rank=rank, alpha=float(rank)), True


def _key(module: _Module, letter: str) -> str:
    return f"{PREFIX}{module.path}.lora_{letter}.weight"


def _kind_of(name: str) -> str:
    return next((kind for part, kind in _OTHER_TENSORS.items() if part in name), "")


def _damaged(source: str, problem: str, names: list[str], kind: str) -> IntegrityError:
    listed = ", ".join(name[:120] for name in names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
    return IntegrityError(
        f"{source}: its tensors do not fit its config.",
        cause=f"{problem}: {listed}" + (f" ({kind})" if kind else ""),
        fix="save the adapter again with PEFT, under the name 'default'",
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
