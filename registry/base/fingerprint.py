"""Fingerprints of a base model: which architecture, which weights, which tokenizer.

An adapter on other weights loads without complaint elsewhere and answers nonsense; here the fingerprint is part of
every pack and a pack for another base is refused. Fingerprints are taken from the files, so nothing heavy is imported.
"""

import json
from pathlib import Path
from typing import Any

from ...domains.data.catalog import BUILTIN
from ...domains.errors import IncompatibleError, NotFoundError
from ..store.blobs import sha256_of, sha256_of_file
from ..store.files import write_atomic
from ..store.manifest import BaseRecord
from ..store.strict_json import canonical_json

POCKET = "pocket"  # the name of the built-in base model
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "spiece.model")
# keys of config.json that say nothing of what the model computes; every other one counts, known to us or not
_IDLE_KEYS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def find_base(source: str, *, revision: str | None = None) -> Path:
    """The folder of a base model: the built-in one, a folder, or the Hub's through its client and cache.

    Raises:
        NotFoundError: There is no such folder or model.
        RemoteError: The Hub cannot be asked, or does not give it.
    """
    if source == POCKET:
        return BUILTIN / POCKET
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        return folder.resolve()
    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise NotFoundError(
            f"There is no base model {source!r}.",
            cause="it is neither 'pocket', nor a folder, nor a Hub id like owner/name",
            fix="registry init --base pocket",
        )
    return _download(source, revision)


def fingerprint(folder: Path, *, source: str, revision: str | None = None, cache: Path | None = None) -> BaseRecord:
    """The record of a base model's files.

    Args:
        folder: Where its files are.
        source: How the user named it.
        revision: The Hub commit, if it is a Hub model.
        cache: A file that remembers digests of large files by size and time of change.

    Raises:
        NotFoundError: There is no config or no tokenizer in the folder.
        IncompatibleError: The weights are not safetensors.
    """
    config = _read_config(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise IncompatibleError(
            f"{folder} has no weights as safetensors.",
            cause="other formats can run code when they are read",
            fix="save the model with model.save_pretrained(folder)",
        )
    known = _read_cache(cache)
    before = len(known)
    files = {path.name: _digest_of_file(path, known) for path in weights}
    if cache is not None and len(known) > before:
        write_atomic(cache, canonical_json(known))
    is_named = source == POCKET or not Path(source).expanduser().is_dir()
    weights_digest = sha256_of(canonical_json(files))
    architectures = config.get("architectures") or [config.get("model_type", "unknown")]
    computation = {key: value for key, value in config.items() if key not in _IDLE_KEYS}
    return BaseRecord(
        id=source if is_named else f"local:{weights_digest.removeprefix('sha256:')[:16]}",
        revision=revision,
        architecture=f"{architectures[0]} {sha256_of(canonical_json(computation))}",
        weights=weights_digest,
        tokenizer=_tokenizer_digest(folder),
        chat_template=_template_digest(folder),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
    )


def _download(source: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    from ..hub.errors import failures, is_unknown, to_lorary_error

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except failures() as error:
        if is_unknown(error):
            raise NotFoundError(
                f"There is no base model {source!r} on the Hub, or you may not see it.",
                cause=str(error).splitlines()[0],
                fix="check the id and the revision, log in with hf auth login, or use --base pocket",
            ) from error
        raise to_lorary_error(error, repo=source, endpoint=HfApi().endpoint) from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, found {type(config).__name__}")
        return config
    except (OSError, ValueError) as error:
        raise NotFoundError(f"{folder} is no model folder.", cause=f"config.json: {error}") from error


def _tokenizer_digest(folder: Path) -> str:
    files = {name: sha256_of_file(folder / name) for name in _TOKENIZER_FILES if (folder / name).is_file()}
    if not files:
        raise NotFoundError(f"{folder} has no tokenizer.", cause=f"none of {', '.join(_TOKENIZER_FILES)} is there")
    return sha256_of(canonical_json(files))


def _template_digest(folder: Path) -> str | None:
    template = folder / "chat_template.jinja"
    if template.is_file():
        return sha256_of_file(template)
    config = folder / "tokenizer_config.json"
    if config.is_file():
        text = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
        return None if text is None else sha256_of(json.dumps(text).encode())
    return None


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
