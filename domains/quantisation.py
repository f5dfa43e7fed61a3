"""Name the quantisation of a base model from its config.json, and know GGUF files; nothing heavy is imported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import IncompatibleError

_EXTRA = ("bitsandbytes", "torchao")  # what lorary[quantized] installs


def quantisation_of(config: Mapping[str, Any]) -> str | None:
    """Return how the weights are quantised, such as `bitsandbytes nf4` or `gptq 4-bit`, or None if they are not."""
    text = config.get("text_config")
    found = config.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, Mapping) else None
    )
    if not isinstance(found, Mapping) or not found:
        return None
    if found.get("load_in_4bit"):
        return f"bitsandbytes {_word(found.get('bnb_4bit_quant_type', 'fp4'))}"
    if found.get("load_in_8bit"):
        return "bitsandbytes int8"
    method = _word(found.get("quant_method", "unknown"))
    kind = found.get("quant_type")
    default = kind.get("default") if isinstance(kind, Mapping) else kind
    name = default.get("_type") if isinstance(default, Mapping) else default
    if isinstance(name, str):
        return f"{method} {_word(name)}"
    bits = found.get("bits", found.get("w_bit"))
    return f"{method} {bits}-bit" if type(bits) is int else method


def is_gguf(source: str | Path) -> bool:
    """Return whether a base model is a GGUF file, whose weights transformers de-quantises when it loads them."""
    return Path(source).suffix.lower() == ".gguf"


def cannot_read_gguf(source: Path, error: Exception) -> IncompatibleError:
    """Return the error for a GGUF file that transformers cannot load on this machine."""
    is_missing = isinstance(error, ImportError)
    return IncompatibleError(
        f"The base model {source.name} cannot be loaded here.",
        cause=next(iter(str(error).splitlines()), type(error).__name__),
        fix="pip install 'lorary[gguf]'" if is_missing else "use the model's safetensors weights",
    )


def cannot_load(quantisation: str, error: Exception) -> IncompatibleError:
    """Return the error for a quantised base model that transformers cannot load on this machine."""
    method = quantisation.split(maxsplit=1)[0]
    missing = isinstance(error, ImportError)
    fix = "use the base model in full precision, or a machine that has what the cause names"
    if missing:
        fix = "pip install 'lorary[quantized]'" if method in _EXTRA else "install what the cause names"
    return IncompatibleError(
        f"The base model is quantised ({quantisation}) and cannot be loaded here.",
        cause=next(iter(str(error).splitlines()), type(error).__name__),
        fix=fix,
    )


def _word(value: object) -> str:
    return str(value)[:40]
