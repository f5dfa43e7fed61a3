"""Validation of untrusted manifests: the list of files, and the types of the free-form records.

`PackManifest` itself checks what holds for every manifest, including those in a store. This module checks what holds
for a finished pack: exactly the expected files, each of its kind, and records of the types that commands and reports
read.
"""

import re
from datetime import datetime
from typing import Any, Final

from ...domains.errors import IntegrityError
from ..store.manifest import ADAPTER_CONFIG, ADAPTER_TENSORS, ROUTER_CONFIG, ROUTER_TENSORS, PackManifest

MAX_TEXT: Final = 4096  # characters of a description, a license, a name
MAX_LAYERS: Final = 4096  # decoder layers
MAX_EXPERTS: Final = 4096
MAX_ALPHA: Final = 1e6
MAX_RECORD: Final = 100_000  # values in one free-form record
MAX_TENSOR_FILE: Final = 8 << 30  # bytes; a file is read into memory at once
MAX_JSON_FILE: Final = 4 << 20

_RUN: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,127}")
_NUMBER: Final = (int, float)
_OPTIONAL: Final = (int, float, type(None))

# types, by key, of what commands and reports read from the free-form records; a list has one type of members, the key
# "" stands for any key, and keys not listed are not checked; a listed key may be missing (an object or a list may also
# be None) unless it ends with "!"
_SCORES: Final = {
    "base": _OPTIONAL,
    "alone": _OPTIONAL,
    "routed": _OPTIONAL,
    "general_base": _OPTIONAL,
    "general_routed": _OPTIONAL,
    "share_of_oracle_gain": _OPTIONAL,
    "interval": [_NUMBER],
    "gate": {
        "parent!": _NUMBER,
        "new!": _NUMBER,
        "bytes!": int,
        "data!": str,
        "tolerance!": _NUMBER,
        "holds!": bool,
    },
}
_FORMS: Final[dict[str, Any]] = {
    "allocation": {"schedule!": str, "counts!": [int]},
    "lineage": {
        "preservation": {"version!": int, "digest!": str},
        "parent": {"version!": int, "digest!": str},
        "mode": (str, type(None)),
    },
    "train": {
        "losses": [_NUMBER],
        "tokens": int,
        "steps": int,
        "seconds": _NUMBER,
        "warm_start": (str, type(None)),
        "settings": {"learning_rate!": _NUMBER, "seed!": int},
        "bank": {"experts": _NUMBER, "schedule": str, "expert_free": _NUMBER, "rank_gates": bool},
        "imported": {"from!": str, "commit!": (str, type(None)), "files!": {"": str}, "routing": (str, type(None))},
        "data": {
            "files!": [str],
            "digest!": str,
            "rows!": int,
            "bytes": int,
            "held_out!": int,
            "held_out_share": _NUMBER,
        },
    },
    "evaluation": _SCORES,
    "proof": {
        "frozen": {
            "base!": str,
            "attached": str,
            "store": {"before!": str, "after!": str},
            "packs": {"": str},  # in place of the store's roots until those were kept
            "tensors!": int,
        },
        "unchanged": bool,
        "inherited": {"from!": str, "experts!": int, "digest!": str},
        "drift": {"domains!": int, "mean_kl!": _NUMBER, "top1_flips!": int, "newcomer_share!": _NUMBER},
        "chat": {
            "holds!": bool,
            "rendered!": str,
            "template": {"texts!": int, "before!": _NUMBER, "after!": _NUMBER, "largest!": int},
            "everyday!": {"texts!": int, "before!": _NUMBER, "after!": _NUMBER, "largest!": int},
            "general_before!": _NUMBER,
            "general_after!": _NUMBER,
            "questions!": str,
            "older_domains!": int,
            "older_most!": _NUMBER,
        },
    },
    "tool": {"": str},
}


def check_manifest(manifest: PackManifest) -> None:
    """Raise IntegrityError if a manifest is not that of a finished pack.

    Raises:
        IntegrityError: A file is missing, unknown or of the wrong kind, or a record has a wrong type.
    """
    source = f"{manifest.name}@{manifest.version}"
    try:
        _check_files(manifest)
        _check_texts(manifest)
        for key, form in _FORMS.items():
            value = getattr(manifest, key)
            _check_size(key, value)
            _check_form(key, value, form)
        counts = manifest.allocation["counts"]
        if not 1 <= len(counts) <= MAX_LAYERS or not all(0 <= count <= MAX_EXPERTS for count in counts):
            raise ValueError(f"allocation.counts has {len(counts)} layers, from {min(counts, default=0)} experts")
        for expert in manifest.experts:
            if expert.alpha > MAX_ALPHA:
                raise ValueError(f"expert {expert.id} has alpha {expert.alpha:g}; at most {MAX_ALPHA:g} is read")
            if not expert.layers or max(expert.layers) >= len(counts):
                raise ValueError(f"expert {expert.id} is in {_short(expert.layers)} of {len(counts)} layers")
    except ValueError as error:
        raise unsound(source, str(error)) from error


def unsound(source: str, cause: str) -> IntegrityError:
    """Return the error for a pack whose contents do not match its manifest."""
    return IntegrityError(
        f"{source} is no sound pack.", cause=cause, fix="use another version of it, or report it to its author"
    )


def kinds_of_files(manifest: PackManifest) -> dict[str, str]:
    """Return the path and kind of every file of a pack with these experts, except the manifest."""
    files = {ADAPTER_CONFIG: "adapter", ADAPTER_TENSORS: "adapter", ROUTER_CONFIG: "router", ROUTER_TENSORS: "router"}
    for expert in manifest.experts:
        files |= {f"experts/{expert.id}/{name}": "expert" for name in (ADAPTER_CONFIG, ADAPTER_TENSORS)}
    return files


def _check_files(manifest: PackManifest) -> None:
    if manifest.version < 1 or not 1 <= len(manifest.experts) <= MAX_EXPERTS:
        raise ValueError(f"it has version {manifest.version} and {len(manifest.experts)} experts")
    expected = kinds_of_files(manifest)
    found = {file.path: file.kind for file in manifest.files}
    for path in sorted(expected.keys() | found.keys()):
        if found.get(path) != expected.get(path):
            there, wanted = found.get(path, "missing"), expected.get(path, "unknown")
            raise ValueError(f"the file {path} is {_short(there)}; such a pack has it as {wanted}")
    for file in manifest.files:
        most = MAX_JSON_FILE if file.path.endswith(".json") else MAX_TENSOR_FILE
        if file.size > most:
            raise ValueError(f"{file.path} has {file.size} bytes; at most {most} are read")


def _check_texts(manifest: PackManifest) -> None:
    base = manifest.base
    texts = {
        "description": manifest.description,
        "license": manifest.license,
        "created": manifest.created,
        "base.id": base.id,
        "base.revision": base.revision or "-",
        "base.architecture": base.architecture,
        "base.dtype": base.dtype,
        "base.quantization": base.quantization or "-",
    }
    for key, text in texts.items():
        if len(text) > MAX_TEXT or (not text.strip() and key not in ("description", "license")):
            raise ValueError(f"{key} has {len(text)} characters; at most {MAX_TEXT} are read, and not none")
    datetime.fromisoformat(manifest.created)
    run = manifest.train.get("run")  # used as a folder name to find the domain's text again
    if run is not None and not _RUN.fullmatch(str(run)):
        raise ValueError(f"train.run cannot be {_short(run)}")


def _check_size(key: str, value: object) -> None:
    waiting, count = [value], 0
    while waiting:
        one = waiting.pop()
        count += 1
        if count > MAX_RECORD:
            raise ValueError(f"{key} has more than {MAX_RECORD} values")
        if isinstance(one, str) and len(one) > MAX_TEXT:
            raise ValueError(f"{key} holds a text of {len(one)} characters; at most {MAX_TEXT} are read")
        waiting += list(one.values()) if isinstance(one, dict) else one if isinstance(one, list | tuple) else []


def _check_form(path: str, value: object, form: Any) -> None:
    """Raise ValueError if a value does not match its form; `path` names it in errors."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{path} is {_short(value)}, not an object")
        for name, member_form in form.items():
            _check_member(path, value, name, member_form)
    elif isinstance(form, list):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{path} is {_short(value)}, not a list")
        for i, member in enumerate(value):
            _check_form(f"{path}[{i}]", member, form[0])
    elif type(value) not in (form if isinstance(form, tuple) else (form,)):
        raise ValueError(f"{path} cannot be {_short(value)}")


def _check_member(path: str, record: dict[str, Any], name: str, form: Any) -> None:
    key, is_required = name.removesuffix("!"), name.endswith("!")
    if not name:
        for key, value in record.items():
            _check_form(f"{path}.{key}", value, form)
    elif key in record:
        is_left_out = record[key] is None and not is_required and isinstance(form, dict | list)
        if not is_left_out:
            _check_form(f"{path}.{key}", record[key], form)
    elif is_required:
        raise ValueError(f"{path}.{key} is missing")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
