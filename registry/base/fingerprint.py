"""Compute the fingerprint of a base model: digests of its architecture, weights, tokenizer and chat template.

A LoRA adapter loads on any base model with matching shapes and then gives wrong output. Every pack therefore carries
the fingerprint of its base, and a pack made for another base is refused. Only files are read, so nothing heavy is
imported.
"""

import json
from pathlib import Path
from typing import Any

from ...domains.errors import IncompatibleError, NotFoundError
from ...domains.quantisation import is_gguf, quantisation_of
from ..store.blobs import sha256_of, sha256_of_file
from ..store.files import write_atomic
from ..store.manifest import BaseRecord
from ..store.strict_json import canonical_json
from .custom_code import check_custom_code
from .find import has_name
from .named import check_named

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "spiece.model")
# keys of tokenizer_config.json that change no token: places, versions, what is a part of its own
_IGNORED_SETTINGS = {
    *("name_or_path", "transformers_version", "tokenizer_file", "special_tokens_map_file", "processor_class"),
    *("backend", "is_local", "local_files_only", "chat_template", "model_max_length"),
}
_UNSAID = (None, "", {}, [])
# keys of config.json that do not affect what the model computes; every other key counts, known or unknown
_IGNORED_KEYS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def fingerprint(
    folder: Path,
    *,
    source: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache: Path | None = None,
) -> BaseRecord:
    """Return the fingerprint of the base model in a folder.

    Args:
        folder: The model's folder, or its GGUF file.
        source: The name that the user gave: `pocket`, `smollm2`, a folder, a GGUF file, or a Hub id.
        revision: The Hub commit of a Hub model.
        trust_remote_code: Accept a model that brings Python code; its files count as part of the architecture.
        cache: A JSON file that caches digests of weight files by path, inode, size and modification time.

    Raises:
        NotFoundError: The folder has no config or no tokenizer.
        IntegrityError: The weights are not those that a named base has.
        IncompatibleError: The weights are not safetensors, an adapter is beside them, or code that is not trusted.
    """
    if is_gguf(folder) and folder.is_file():
        return _gguf_record(folder, cache)
    if (folder / "adapter_config.json").is_file():
        raise IncompatibleError(
            f"{folder} is not a base model alone.",
            cause="it has an adapter_config.json, whose adapter transformers would attach to the weights",
            fix=f"registry import NAME {folder} adds a PEFT adapter to a registry as a domain",
        )
    config = _read_config(folder)
    code = check_custom_code(folder, source=source, trusted=trust_remote_code)
    weights = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not weights or _reads_pickle(folder):
        raise IncompatibleError(
            f"{folder} has no safetensors weights.",
            cause="other formats can execute code when they are read",
            fix=next(
                (f"registry init --base {path}" for path in sorted(folder.glob("*.gguf"))),
                "save the model with model.save_pretrained(folder)",
            ),
        )
    files = _digests(weights, cache)
    is_named = has_name(source) or not Path(source).expanduser().is_dir()
    weights_digest = sha256_of(canonical_json(files))
    check_named(source, weights_digest, folder)
    architectures = config.get("architectures") or [config.get("model_type", "unknown")]
    computation = {key: value for key, value in config.items() if key not in _IGNORED_KEYS}
    return BaseRecord(
        id=source if is_named else f"local:{weights_digest.removeprefix('sha256:')[:16]}",
        revision=revision,
        architecture=f"{architectures[0]} {sha256_of(canonical_json(computation))}"
        + (f" code {sha256_of(canonical_json(code))}" if code else ""),
        weights=weights_digest,
        tokenizer=_tokenizer_digest(folder),
        tokenizer_settings=_tokenizer_settings_digest(folder),
        chat_template=_template_digest(folder),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        quantization=quantisation_of(config),
    )


def _gguf_record(path: Path, cache: Path | None) -> BaseRecord:
    """Return the fingerprint of a GGUF file, which has weights, tokenizer and chat template in one."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise IncompatibleError(f"{path} is not a GGUF file.", cause="it does not begin with GGUF")
    digest = _digests([path], cache)[path.name]
    return BaseRecord(
        id=f"local:{digest.removeprefix('sha256:')[:16]}",
        revision=None,
        architecture=f"GGUF {digest}",
        weights=digest,
        tokenizer=digest,
        chat_template=digest,
        dtype="float32",
    )


def _digests(paths: list[Path], cache: Path | None) -> dict[str, str]:
    """Return the digests of files by name, from the cache where it has them."""
    known = _read_cache(cache)
    before = len(known)
    found = {path.name: _digest_of_file(path, known) for path in paths}
    if cache is not None and len(known) > before:
        write_atomic(cache, canonical_json(known))
    return found


def _reads_pickle(folder: Path) -> bool:
    """Return whether transformers would read pickled weights, since no safetensors file has the name that it reads."""
    names = [f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")]
    return next((name.startswith("pytorch") for name in names if (folder / name).is_file()), False)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return _read_object(folder / "config.json")
    except (OSError, ValueError, RecursionError) as error:
        raise NotFoundError(f"{folder} is not a model folder.", cause=f"config.json: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object; numbers that are not finite, which canonical JSON has not, become their names."""
    value = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, found {type(value).__name__}")
    return value


def _read_settings(path: Path) -> dict[str, Any]:
    """Return a JSON object beside the config; empty if there is no such file.

    Raises:
        IncompatibleError: It is broken.
    """
    if not path.exists():
        return {}
    try:
        return _read_object(path)
    except (OSError, ValueError, RecursionError) as error:
        raise IncompatibleError(
            f"The base model {path.parent} cannot be loaded.",
            cause=f"{path.name}: {error}",
            fix="download the model again, or save its tokenizer with tokenizer.save_pretrained(folder)",
        ) from error


def _tokenizer_digest(folder: Path) -> str:
    files = {name: sha256_of_file(folder / name) for name in _TOKENIZER_FILES if (folder / name).is_file()}
    if not files:
        raise NotFoundError(f"{folder} has no tokenizer.", cause=f"found none of {', '.join(_TOKENIZER_FILES)}")
    return sha256_of(canonical_json(files))


def _tokenizer_settings_digest(folder: Path) -> str:
    """Return the digest of what the tokenizer's configs say: end tokens, added tokens, which tokens it adds."""
    settings = _read_settings(folder / "tokenizer_config.json")
    said = {key: value for key, value in settings.items() if key not in _IGNORED_SETTINGS and value not in _UNSAID}
    kept = {
        "tokenizer_config": said,
        "special_tokens_map": _read_settings(folder / "special_tokens_map.json"),
        "added_tokens": _read_settings(folder / "added_tokens.json"),
    }
    return sha256_of(canonical_json(kept))


def _template_digest(folder: Path) -> str | None:
    template = folder / "chat_template.jinja"
    if template.is_file():
        return sha256_of_file(template)
    text = _read_settings(folder / "tokenizer_config.json").get("chat_template")
    return None if text is None else sha256_of(json.dumps(text).encode())


def _read_cache(cache: Path | None) -> dict[str, str]:
    if cache is None:
        return {}
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _digest_of_file(path: Path, known: dict[str, str]) -> str:
    status = path.stat()
    key = f"{path.resolve()}|{status.st_ino}|{status.st_size}|{status.st_mtime_ns}"
    if key not in known:
        known[key] = sha256_of_file(path)
    return known[key]
