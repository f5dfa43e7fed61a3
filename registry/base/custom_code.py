"""Find the Python code that a base model brings along, and refuse the model unless the user trusts that code.

A config with `auto_map` makes transformers import classes from `.py` files beside it, and `custom_generate/generate.py`
replaces `generate`. Loading such a model runs that code. Only files are read here; nothing is imported.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ...domains.errors import IncompatibleError
from ..store.blobs import sha256_of_file

CODE_FILES: Final = "*.py"
_CUSTOM_GENERATE: Final = "custom_generate/generate.py"
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
# large, and no configs
_DATA_FILES: Final = {"tokenizer.json", "vocab.json", "added_tokens.json", "model.safetensors.index.json"}
_CODE_KEYS: Final = ("auto_map", "custom_generate")
# a name with a slash is a repository whose compiled code transformers downloads and loads
_IMPLEMENTATIONS: Final = ("attn_implementation", "_attn_implementation", "experts_implementation")


def check_commit(source: str, revision: str | None) -> None:
    """Require a full commit for a model of the Hub whose code is trusted: branches and tags can be moved.

    Raises:
        IncompatibleError: The revision is not a commit of 40 hexadecimal digits.
    """
    if revision is None or not _COMMIT.fullmatch(revision):
        raise IncompatibleError(
            f"The code of {source} can only be trusted at one commit.",
            cause=f"expected a commit of 40 hexadecimal digits, found {revision or 'no revision'}",
            fix=f"registry init --base {source} --revision COMMIT --trust-remote-code",
        )


def check_custom_code(folder: Path, *, source: str, trusted: bool) -> dict[str, str]:
    """Return the digest of each code file of a base model by its path; none for a model without custom code.

    Args:
        folder: The model's files.
        source: The name that the user gave.
        trusted: The user passed `--trust-remote-code`.

    Raises:
        IncompatibleError: The model brings code that is not trusted, or names code of another repository.
    """
    found = list(_custom_code(folder))
    if not found:
        return {}
    if not trusted:
        raise IncompatibleError(
            f"The base model {source} brings Python code of its own, which would be executed.",
            cause="; ".join(f"{where}: {what}" for where, what in found[:3]),
            fix=_fix(source),
        )
    for where, what in found:
        if "/" in what:
            raise IncompatibleError(
                f"The base model {source} names code of another repository, which no commit pins.",
                cause=f"{where}: {what}",
                fix="copy that code into the model's folder, and name it without a repository",
            )
    files = sorted(path for path in folder.rglob(CODE_FILES) if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in files}


def _fix(source: str) -> str:
    pin = "" if Path(source).expanduser().is_dir() else " --revision COMMIT"
    command = f"registry init --base {source}{pin} --trust-remote-code"
    return f"use a base model without code; or read the code, and if you trust it: {command}"


def _custom_code(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield where code is named, and its name."""
    for path in sorted(folder.glob("*.json")):
        if path.name not in _DATA_FILES:
            for key, name in _named_code(_read(path), ""):
                yield f"{path.name}, {key}", name
    if (folder / _CUSTOM_GENERATE).exists():
        yield _CUSTOM_GENERATE, "replaces generate"


def _named_code(value: Any, where: str) -> Iterator[tuple[str, str]]:
    items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for key, item in items:
        path = f"{where}.{key}" if where else str(key)
        if (key in _CODE_KEYS and item) or (key in _IMPLEMENTATIONS and "/" in json.dumps(item)):
            yield path, json.dumps(item)
        else:
            yield from _named_code(item, path)


def _read(path: Path) -> Any:
    """Return the JSON of a config; what is not JSON, transformers does not read either."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
