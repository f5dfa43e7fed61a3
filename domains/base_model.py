"""Load the frozen base model, and find its decoder layers in any model family."""

import inspect
import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from .check_base import check_complete, check_generation_config, check_stored_dtypes, loading
from .errors import IncompatibleError, InputError
from .linear import linear_modules, settle
from .quantisation import cannot_load, cannot_read_gguf, is_gguf, quantisation_of

DECODER_ONLY = "choose a decoder-only language model; docs/models.md lists the kinds that work"


@dataclass(frozen=True)
class ModelLayout:
    """Location and shape of the decoder layers of a causal language model."""

    decoder: str  # module path of what holds embedding and layers: "model", "transformer", "gpt_neox"
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
        source: A Hub id, a folder, or a GGUF file.
        revision: A branch, tag or commit on the Hub.
        device: `cpu`, `cuda`, `cuda:1`, `mps`.
        dtype: `auto` is float32 on a CPU (bfloat16 is slower there) and the checkpoint's dtype elsewhere.
        trust_remote_code: Run the Python files that the model brings along; without it transformers never asks.

    Raises:
        InputError: `device` is not a device name.
        IncompatibleError: This machine has no such device or lacks what the quantisation needs, the model is no causal
            language model, or its files are damaged, incomplete, or say more than transformers would read.
    """
    check_device(device)
    wanted = torch.float32 if dtype == "auto" and device == "cpu" else dtype
    options: Any = {"revision": revision, "trust_remote_code": trust_remote_code}
    if is_gguf(source):
        return _load_gguf(Path(source), device=device, dtype=torch.float32 if wanted == "auto" else wanted)
    check_generation_config(Path(source))
    with loading(source):
        check_causal_lm(source, revision=revision)
        config, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
        quantisation = quantisation_of(config)
        _check_method(quantisation, config)
        if quantisation is None:
            found: Any = AutoModelForCausalLM.from_pretrained(
                # the error of transformers over other sizes has no names; `check_complete` has
                source,
                dtype=wanted,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
            model, info = found
            check_complete(source, model, info)
            check_stored_dtypes(source, model)
            model = model.to(device)
        else:
            model = _load_quantised(source, quantisation, dtype=wanted, device_map={"": device}, **options)
        model = model.eval().requires_grad_(False)
        return model, AutoTokenizer.from_pretrained(source, **options)


def _check_method(quantisation: str | None, config: Mapping[str, Any]) -> None:
    """Raise an error if transformers would pass over the quantisation of a config, which it does with a warning."""
    said = config.get("quantization_config")
    if quantisation is not None and said and not AutoHfQuantizer.supports_quant_method(said):
        raise cannot_load(quantisation, ValueError(f"transformers knows no quantisation {quantisation}"))


def _load_gguf(path: Path, *, device: str, dtype: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a GGUF file, de-quantised: an ordinary model in `dtype`."""
    options: Any = {"gguf_file": path.name, "trust_remote_code": False}
    # without it, weights stay packed where a package of compute kernels is installed
    how = GgufConfig(dequantize=True)
    try:
        values, _ = PreTrainedConfig.get_config_dict(path.parent, gguf_file=path.name)
        check_kind(values)
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, quantization_config=how, **options)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    except (ImportError, OSError, KeyError, RuntimeError, ValueError) as error:  # in transformers' words
        raise cannot_read_gguf(path, error) from error
    return model.to(device).eval().requires_grad_(False), tokenizer


def _load_quantised(source: str | Path, quantisation: str, **arguments: Any) -> PreTrainedModel:
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **arguments)
    except (ImportError, RuntimeError, ValueError) as error:  # a missing library or GPU, in transformers' words
        raise cannot_load(quantisation, error) from error
    settle(model)
    return model


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


def check_causal_lm(source: str | Path, *, revision: str | None = None) -> None:
    """Raise an error if the model in `source` is of a kind that is no causal language model; reads its config only.

    Raises:
        IncompatibleError: It is an encoder, an encoder-decoder, or of a kind that AutoModelForCausalLM does not know.
    """
    values, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    check_kind(values)


def check_kind(values: Mapping[str, Any]) -> None:
    """Raise an error if the values of a config.json are those of no causal language model.

    Raises:
        IncompatibleError: See `check_causal_lm`.
    """
    kind = str(values.get("model_type"))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if "auto_map" in values:  # a model with code of its own
            return
        cause = f"AutoModelForCausalLM has no model of type {kind!r}"
    elif values.get("is_encoder_decoder", getattr(CONFIG_MAPPING[kind], "is_encoder_decoder", False)):
        cause = f"its type {kind!r} has an encoder beside the decoder"
    else:
        return
    raise IncompatibleError("The base model is no causal language model.", cause=cause, fix=DECODER_ONLY)


def find_layout(model: PreTrainedModel) -> ModelLayout:
    """Find the decoder layers: the list of `num_hidden_layers` modules that is nearest to the token embedding.

    Vision and audio towers have lists of layers, too; the decoder of text is the innermost module that holds both a
    list of layers and the embedding of the tokens.

    Raises:
        IncompatibleError: The model has no such list.
    """
    config = model.config.get_text_config(decoder=True)
    # num_hidden_layers counts the encoder's layers in a decoder taken out of an encoder-decoder, and those of the cache
    # where one decoder layer has two of them
    counts = {getattr(config, name, None) for name in ("decoder_layers", "num_layers", "num_hidden_layers")}
    embedding = _path_of(model, model.get_input_embeddings())
    found = {
        path: _common_parent(path, embedding)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) in counts
        and any(linear_modules(layer) for layer in module)
    }
    if not found:
        raise IncompatibleError(
            f"{type(model).__name__} has no list of {config.num_hidden_layers} decoder layers with linear modules.",
            fix=DECODER_ONLY,
        )
    path = max(found, key=lambda path: (len(found[path].split(".")) if found[path] else 0, -len(path.split("."))))
    layers: Any = model.get_submodule(path)
    transposed = any(isinstance(part, Conv1D) for part in layers.modules())
    return ModelLayout(found[path], path, len(layers), config.hidden_size, transposed)


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


def _common_parent(first: str, second: str) -> str:
    """Return the path of the innermost module that holds two modules."""
    parents = zip(first.split(".")[:-1], second.split(".")[:-1], strict=False)
    return ".".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], parents))


def hidden_states_at(model: PreTrainedModel, layout: ModelLayout, layer: int, **inputs: Tensor) -> Tensor:
    """Return the input of decoder layer `layer`, without running that layer or any after it.

    Other threads may call the same model meanwhile.
    """
    captured: list[Tensor] = []

    def capture(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        captured.append(first_tensor(args, kwargs))
        raise _LayerReachedError

    layers: Any = model.get_submodule(layout.layers)
    handle = layers[layer].register_forward_pre_hook(for_this_thread(capture), with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except _LayerReachedError:
        pass
    finally:
        handle.remove()
    return captured[0]


def for_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that does nothing in other threads: a module has its hooks for all that call it."""
    owner = threading.get_ident()

    def run(*args: Any) -> Any:
        return hook(*args) if threading.get_ident() == owner else None

    return run


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
