"""Refuse base models of whose files transformers would silently make another model, or nothing at all."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .errors import IncompatibleError, LoraryError

AGAIN: Final = "download the model again, or save the whole causal language model with model.save_pretrained(folder)"
GENERATION_FILE: Final = "generation_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# what older versions of transformers saved, and every version computes anew
_COMPUTED: Final = ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")
_PROBE_TOKENS: Final = 8


@contextmanager
def loading(source: str | Path) -> Iterator[None]:
    """Turn what transformers raises over the files of a base model into one clear error.

    Raises:
        IncompatibleError: The message names the model; the cause is the library's.
    """
    try:
        yield
    except (LoraryError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file ends in almost any type, from KeyError to ZeroDivisionError
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        is_missing = isinstance(error, ImportError)
        raise IncompatibleError(
            f"The base model {source} cannot be loaded.",
            cause=": ".join([type(error).__name__, " ".join(lines[:2])]),
            fix="install what the cause names" if is_missing else AGAIN,
        ) from error


def check_complete(source: str | Path, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Raise an error if the files lack weights of the model, or have others: of another size, or in its layers.

    What belongs to no module of the model, such as a vision tower or a value head, may be left out.

    Raises:
        IncompatibleError: The message names the first.
    """
    missing = sorted(str(key) for key in info.get("missing_keys") or ())
    if missing:
        raise IncompatibleError(
            f"The base model {source} is incomplete.",
            cause=f"its files lack {len(missing)} of its weights, such as {missing[0]}, which would be random numbers",
            fix=AGAIN,
        )
    other: list[Any] = sorted(info.get("mismatched_keys") or ())
    if other:
        name, stored, wanted = other[0]
        raise IncompatibleError(
            f"The weights of the base model {source} have other sizes than its config.json says.",
            cause=f"{len(other)} of them, such as {name}: {tuple(stored)} in the file, {tuple(wanted)} in the model",
            fix=AGAIN,
        )
    modules = dict(model.named_modules())
    surplus = sorted(key for key in map(str, info.get("unexpected_keys") or ()) if _would_count(key, modules))
    if surplus:
        raise IncompatibleError(
            f"The base model {source} has weights that {type(model).__name__} does not use.",
            cause=f"{len(surplus)} of them, such as {surplus[0]}: without them it computes something else",
            fix="use the class and the config.json that the weights were saved with; " + AGAIN,
        )


def _would_count(key: str, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether an unused weight lies in a module that the model has, or in a list of its layers."""
    if key.endswith(_COMPUTED):
        return False
    parts = key.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts))]
    return bool(above) and (above[-1] in modules or any(isinstance(modules.get(p), nn.ModuleList) for p in above))


def check_stored_dtypes(source: str | Path, model: PreTrainedModel) -> None:
    """Raise an error if a weight is stored in numbers that need a scale: transformers would take them as they are.

    Raises:
        IncompatibleError: The message names the first.
    """
    names = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    for path in _weight_files(Path(source)):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                stored = str(file.get_slice(key).get_dtype())
                if not stored.startswith(("F", "BF")) and (key in names or key.endswith(".weight")):
                    raise IncompatibleError(
                        f"The base model {source} has weights that are no floating-point numbers.",
                        cause=f"{key} is stored as {stored}, and config.json has no quantization_config that says how"
                        " to read it",
                        fix="save the quantised model with model.save_pretrained(folder), or use its weights in full"
                        " precision",
                    )


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads the weights of a folder from."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).is_file():
        return []
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


@torch.inference_mode()
def check_finite(source: str | Path, model: PreTrainedModel) -> None:
    """Raise an error if a weight of the model, or what it computes for a few tokens, is not finite.

    Raises:
        IncompatibleError: The message names the first such weight.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64) and parameter.numel():
            low, high = torch.aminmax(parameter)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise IncompatibleError(
                    f"The base model {source} has weights that are not finite.",
                    cause=f"{name} has values from {low.item()} to {high.item()}",
                    fix=AGAIN,
                )
    with loading(source):
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.arange(min(_PROBE_TOKENS, vocabulary), device=model.device).unsqueeze(0)
        logits: Any = model(input_ids=ids, use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise IncompatibleError(
            f"The base model {source} computes numbers that are not finite.",
            cause=f"the logits of {ids.shape[1]} tokens have some, in {str(model.dtype).removeprefix('torch.')}",
            fix="try --dtype float32; " + AGAIN,
        )


def check_special_tokens(source: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise an error if a special token of the tokenizer has no embedding.

    Raises:
        IncompatibleError: The message names it.
    """
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    tokens = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=False)
    beyond = [(i, token) for i, token in tokens if i >= rows]
    if beyond:
        raise IncompatibleError(
            f"The tokenizer of the base model {source} has a special token that the model does not know.",
            cause=f"{beyond[0][1]!r} has the id {beyond[0][0]}, the model has {rows} embeddings",
            fix="use the tokenizer that belongs to the model",
        )


# --- generation_config.json ---


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_token(value: Any) -> bool:
    return _is_count(value) or (isinstance(value, list) and all(map(_is_count, value)))


_KINDS: Final[dict[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), _is_number),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), _is_positive),
    **dict.fromkeys(("top_k", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), _is_count),
    **dict.fromkeys(("min_length", "min_new_tokens", "num_beams"), _is_count),
    **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), _is_token),
}


def check_generation_config(folder: Path) -> None:
    """Raise an error if the generation_config.json of a folder cannot be used: transformers would do without it.

    Raises:
        IncompatibleError: The message names the first value that is off.
    """
    path = folder / GENERATION_FILE
    if not path.is_file():
        return
    fix = f"mend it, download it again, or delete it: rm {path}"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError(f"expected an object, found {type(values).__name__}")
        GenerationConfig.from_dict(dict(values))
    except Exception as error:  # transformers validates with errors of its own
        cause = f"{GENERATION_FILE}: {next(iter(str(error).splitlines()), type(error).__name__)}"
        raise IncompatibleError(f"{folder} has a broken {GENERATION_FILE}.", cause=cause, fix=fix) from error
    for name, fits in _KINDS.items():
        if values.get(name) is not None and not fits(values[name]):
            raise IncompatibleError(
                f"{folder} has a broken {GENERATION_FILE}.", cause=f"{name} cannot be {values[name]!r}", fix=fix
            )
