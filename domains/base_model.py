"""Load the frozen base model, and find decoder layers and linear modules in any model family."""

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from .errors import IncompatibleError, InputError


@dataclass(frozen=True)
class ModelLayout:
    """Location and shape of the decoder layers of a causal language model."""

    decoder: str  # module path of the parent of the layers: "model", "transformer", "gpt_neox"
    layers: str  # module path of the list of layers: "model.layers"
    count: int  # number of decoder layers
    width: int  # size of the hidden state
    transposed: bool = field(default=False, compare=False)  # GPT-2's Conv1D: weights are stored (d_in, d_out)


def load_base_model(
    source: str | Path,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model, frozen and in evaluation mode, and its tokenizer.

    Args:
        source: A Hub id or a folder.
        revision: A branch, tag or commit on the Hub.
        device: `cpu`, `cuda`, `cuda:1`, `mps`.
        dtype: `auto` is float32 on a CPU (bfloat16 is slower there) and the checkpoint's dtype elsewhere.
        trust_remote_code: Run the Python files that the model brings along; without it transformers never asks.

    Raises:
        InputError: `device` is not a device name.
        IncompatibleError: This machine has no such device.
    """
    check_device(device)
    wanted = torch.float32 if dtype == "auto" and device == "cpu" else dtype
    options: Any = {"revision": revision, "trust_remote_code": trust_remote_code}
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=wanted, **options)
    model = model.to(device).eval().requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(source, **options)


def check_device(device: str) -> None:
    """Raise an error if this machine does not have `device`.

    Raises:
        InputError: `device` is not a device name.
        IncompatibleError: This machine has no such device.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"{device!r} is not a device.", fix="use --device cpu, cuda or mps") from error
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(kind, False):
        raise IncompatibleError(
            f"There is no {kind!r} device on this machine.",
            cause=f"requested {device!r}, found {', '.join(name for name, here in present.items() if here)}",
            fix="repeat the command with --device cpu",
        )


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the maximum sequence length in tokens, or None if the config sets none (ALiBi, as in BLOOM)."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def find_layout(model: PreTrainedModel) -> ModelLayout:
    """Find the decoder layers: the outermost ModuleList with `num_hidden_layers` entries that hold linear modules.

    Raises:
        IncompatibleError: The model has no such list.
    """
    config = model.config.get_text_config()
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers and linear_modules(module[0]):
            decoder = path.rpartition(".")[0]
            transposed = any(isinstance(part, Conv1D) for part in module[0].modules())
            return ModelLayout(decoder, path, len(module), config.hidden_size, transposed)
    raise IncompatibleError(
        f"{type(model).__name__} has no list of {config.num_hidden_layers} decoder layers with linear modules."
    )


def target_modules(
    model: PreTrainedModel, layout: ModelLayout, names: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    """Return the paths, relative to a decoder layer, of its linear modules: all of them, or those in `names`.

    Args:
        names: Last parts of module paths (`q_proj`, `c_attn`), as in PEFT's `target_modules`.

    Raises:
        InputError: No linear module of a decoder layer has one of the names.
    """
    layers: Any = model.get_submodule(layout.layers)
    found = list(dict.fromkeys(path for layer in layers for path in linear_modules(layer)))
    if names is None:
        return tuple(found)
    known = {path.rpartition(".")[2] for path in found}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"There is no target module named {unknown[0]!r} in {type(model).__name__}.",
            fix=f"choose among: {', '.join(sorted(known))}",
        )
    return tuple(path for path in found if path.rpartition(".")[2] in names)


def linear_modules(module: nn.Module) -> list[str]:
    """Return the paths of the linear modules in `module`, in order."""
    return [path for path, part in module.named_modules() if isinstance(part, nn.Linear | Conv1D)]


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out) of a Linear, or of GPT-2's Conv1D, whose weight is stored transposed."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.nf
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def hidden_states_at(model: PreTrainedModel, layout: ModelLayout, layer: int, **inputs: Tensor) -> Tensor:
    """Return the input of decoder layer `layer`, without running that layer or any after it."""
    captured: list[Tensor] = []

    def capture(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        captured.append(first_tensor(args, kwargs))
        raise _LayerReachedError

    layers: Any = model.get_submodule(layout.layers)
    handle = layers[layer].register_forward_pre_hook(capture, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except _LayerReachedError:
        pass
    finally:
        handle.remove()
    return captured[0]


def first_tensor(args: tuple, kwargs: dict) -> Tensor:
    """Return the hidden states from a decoder layer's arguments: the first one, or `hidden_states`."""
    return args[0] if args else kwargs["hidden_states"]


def bind_arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Return the arguments of `module.forward` by name, whether passed by position or by name."""
    if not args:  # the usual call; inspecting the signature takes as long as the gates of a decoder layer
        return dict(kwargs)
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return {**bound, **bound.get("kwargs", {})}


class _LayerReachedError(Exception):
    """Control flow: stops a forward pass at a layer."""
