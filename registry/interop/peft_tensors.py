"""Convert the tensors of a PEFT adapter into a bank of one expert that computes the same.

An expert has one rank and one alpha. If all modules of the adapter agree on both, its matrices are kept as they are.
Otherwise they are padded with zeros to the largest rank, and each module's scale is folded into its B once, in float32.
The expert gate is 1 because there is one expert, and there are no rank gates.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...adapters.bank import Expert, ExpertBank, LayerExperts
from ...domains.base_model import ModelLayout
from ...domains.errors import IncompatibleError, IntegrityError
from ...domains.linear import linear_modules, linear_shape
from .peft_reader import AdapterConfig, TargetMatcher

PREFIX: Final = "base_model.model."
DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
MAX_LISTED: Final = 3  # tensor names in an error

# parts of the names of tensors other than A and B
_OTHER_TENSORS: Final = {
    "lora_embedding_": "LoRA of an embedding",
    "lora_magnitude_vector": "a DoRA magnitude",
    "modules_to_save": "a saved module",
    "token_adapter": "trained token embeddings",
    ".bias": "a bias",
}

_ROUTED_EXPERT: Final = re.compile(r"\.experts\.(\d+\.|base_layer\.|lora_)")
_TRAINING_ONLY: Final = (".lora_velora_embed",)  # used by the backward pass only


@dataclass(frozen=True, kw_only=True)
class _TargetModule:
    """Linear module that the adapter targets."""

    path: str
    layer: int
    target: str  # path inside the decoder layer
    rank: int
    alpha: float
    scale: float
    shape: tuple[int, int]  # d_in, d_out


def convert_adapter(
    tensors: Mapping[str, Tensor], config: AdapterConfig, model: PreTrainedModel, layout: ModelLayout, *, source: str
) -> ExpertBank:
    """Convert an adapter into a bank that computes the same as PEFT.

    Raises:
        IncompatibleError: It targets other modules than linear modules of decoder layers, or has other widths.
        IntegrityError: Tensors are missing, unexpected or all zero, or their ranks differ from the config.
    """
    modules = _find_targets(config, model, layout, source)
    pairs = _read_pairs(tensors, modules, source)
    expert, folds_scale = _make_expert(config, modules)
    bank = ExpertBank()
    for module in sorted(modules, key=lambda module: module.layer):
        A, B = pairs[module.path]
        if folds_scale:
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


def _find_targets(
    config: AdapterConfig, model: PreTrainedModel, layout: ModelLayout, source: str
) -> list[_TargetModule]:
    matcher = TargetMatcher(config)
    named = {path: module for path, module in model.named_modules() if path}
    output = model.get_output_embeddings()
    linear = [path for path in linear_modules(model) if named[path] is not output]
    places = {
        f"{layout.layers}.{index}.{target}": (index, target)
        for index in range(layout.count)
        for target in linear_modules(named[f"{layout.layers}.{index}"])
    }
    chosen = matcher.find_targets(named, linear=linear)
    if not chosen:
        raise IncompatibleError(
            f"{source}: this adapter targets no module of {type(model).__name__}.",
            cause=f"its target_modules are {_short(config.targets)}, its target_parameters {_short(config.parameters)}",
            fix="pass an adapter of this base model",
        )
    outside = [path for path in chosen if path not in places]
    if outside:
        raise IncompatibleError(
            f"{source}: this adapter cannot be imported.",
            cause=f"it targets {outside[0]}, a {type(named[outside[0]]).__name__}; experts have linear modules of"
            " decoder layers only, because everything else is shared by all domains",
        )
    transposed = [path for path in chosen if isinstance(named[path], Conv1D) and matcher.has_target_weight(path)]
    if transposed:
        raise IncompatibleError(
            f"{source}: this adapter cannot be imported.",
            cause=f"target_parameters names {transposed[0]}.weight, which is transposed, so A and B change places",
        )
    return [
        _TargetModule(
            path=path,
            layer=places[path][0],
            target=places[path][1],
            rank=matcher.rank(path),
            alpha=matcher.alpha(path),
            scale=matcher.scale(path),
            shape=linear_shape(named[path]),
        )
        for path in chosen
    ]


def _read_pairs(
    tensors: Mapping[str, Tensor], modules: list[_TargetModule], source: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of every target module, checked."""
    wanted = {_key(module, letter) for module in modules for letter in "AB"}
    extra = sorted(name for name in tensors.keys() - wanted if not name.endswith(_TRAINING_ONLY))
    missing = sorted(wanted - tensors.keys())
    routed = [name for name in extra if _ROUTED_EXPERT.search(name)]
    if routed:
        raise IncompatibleError(
            f"{source}: this adapter cannot be imported.",
            cause=f"{len(routed)} of its tensors adapt routed experts of the base model, such as {routed[0][:120]};"
            " experts have linear modules only",
        )
    if extra:
        raise _damaged(source, f"{len(extra)} tensors are not in its config", extra, _describe(extra[0]))
    if missing:
        raise _damaged(source, f"{len(missing)} tensors of its config are missing", missing, "")
    pairs = {}
    for module in modules:
        A, B = tensors[_key(module, "A")], tensors[_key(module, "B")]
        _check_pair(A, B, module, source)
        pairs[module.path] = A, B
    if not any(B.any() and A.any() for A, B in pairs.values()):
        raise IntegrityError(
            f"{source}: this adapter has no effect.",
            cause=f"B A is zero for all of its {len(pairs)} modules: it was not trained, or not saved correctly",
        )
    return pairs


def _check_pair(A: Tensor, B: Tensor, module: _TargetModule, source: str) -> None:
    for letter, matrix in (("A", A), ("B", B)):
        if matrix.dtype not in DTYPES:
            cause = f"{_key(module, letter)} is {matrix.dtype}; supported are {', '.join(map(str, DTYPES))}"
            fix = "convert its tensors to float32 and save them again"
            raise IncompatibleError(f"{source}: this adapter cannot be imported.", cause=cause, fix=fix)
    d_in, d_out = module.shape
    ranks = A.shape[0] if A.ndim == 2 else None, B.shape[1] if B.ndim == 2 else None
    if ranks != (module.rank, module.rank):
        cause = f"{module.path}: rank {module.rank} in the config, A is {tuple(A.shape)}, B is {tuple(B.shape)}"
        raise IntegrityError(f"{source}: its tensors do not match its config.", cause=cause)
    if (A.shape[1], B.shape[0]) != (d_in, d_out):
        raise IncompatibleError(
            f"{source} was made for another base model.",
            cause=f"{module.path} has in_features {d_in} and out_features {d_out}; in the adapter"
            f" {A.shape[1]} and {B.shape[0]}",
            fix="pass an adapter of this base model, or create a registry for its own: registry init --base MODEL",
        )


def _make_expert(config: AdapterConfig, modules: list[_TargetModule]) -> tuple[Expert, bool]:
    """Return the expert, and whether each module's scale is folded into its B."""
    first = modules[0]
    rank = max(module.rank for module in modules)
    if first.alpha > 0 and all((m.rank, m.alpha) == (rank, first.alpha) for m in modules):
        return Expert(id="e0", rank=rank, alpha=first.alpha, method="rslora" if config.is_rslora else "lora"), False
    return Expert(id="e0", rank=rank, alpha=float(rank)), True


def _key(module: _TargetModule, letter: str) -> str:
    return f"{PREFIX}{module.path}.lora_{letter}.weight"


def _describe(name: str) -> str:
    return next((kind for part, kind in _OTHER_TENSORS.items() if part in name), "")


def _damaged(source: str, problem: str, names: list[str], kind: str) -> IntegrityError:
    listed = ", ".join(name[:120] for name in names[:MAX_LISTED]) + (", ..." if len(names) > MAX_LISTED else "")
    return IntegrityError(
        f"{source}: its tensors do not match its config.",
        cause=f"{problem}: {listed}" + (f" ({kind})" if kind else ""),
        fix="save the adapter again with PEFT, under the adapter name 'default'",
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
