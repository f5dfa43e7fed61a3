"""What is to be imported: an adapter's two files, and the domain's text. Nothing in them is executed.

Everything that files alone can tell is checked here, before torch is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ...domains.data.catalog import builtin_domains
from ...domains.data.corpus import Source
from ...domains.data.spec import DomainSpec
from ...domains.errors import IncompatibleError, InputError, NotFoundError
from ...domains.remote_ref import REMOTE_PREFIX, RemoteRef
from ..base.fingerprint import fingerprint
from ..measure.held_out import UNKNOWN_LICENSE, DomainData, check_new_name, read_domain_data, spec_of
from ..store.blobs import sha256_of
from ..store.manifest import ADAPTER_CONFIG, ADAPTER_TENSORS, BaseRecord, check_same_base
from ..store.store import Store
from ..store.strict_json import MAX_BYTES
from .peft_reader import AdapterConfig, read_config

PICKLE_FILE: Final = "adapter_model.bin"


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """The bytes of a saved adapter."""

    source: str  # how the user named it
    config: bytes
    tensors: bytes
    commit: str | None = None  # of the Hub
    is_local: bool = True

    @property
    def digests(self) -> dict[str, str]:
        """Digest of each file, by name."""
        return {ADAPTER_CONFIG: sha256_of(self.config), ADAPTER_TENSORS: sha256_of(self.tensors)}


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """An adapter that becomes a domain."""

    name: str
    spec: DomainSpec
    data: DomainData
    files: AdapterFiles
    config: AdapterConfig


def plan_import(store: Store, name: str, source: str, data: Sequence[Source], *, base: BaseRecord | None) -> ImportPlan:
    """The adapter and the text for a new domain.

    Args:
        base: The base model that the adapter must name; None takes it on trust.

    Raises:
        LoraryError: The name, the data or the adapter is off; see `check_new_name`, `read_domain_data`, `read_adapter`
            and `read_config`.
    """
    check_new_name(store, name)
    if not data and name not in builtin_domains():
        raise InputError(
            f"An adapter says nothing of the text of {name!r}.",
            cause="the router knows a domain by its text, and scores are measured on it",
            fix=f"registry import {name} {source} --data FILE",
        )
    files = read_adapter(source)
    config = read_config(files.config, source=f"{source}: {ADAPTER_CONFIG}")
    # whoever trained the adapter says under which license it is, not the built-in domain
    spec = replace(spec_of(name, data), license=UNKNOWN_LICENSE)
    if base is not None:
        _check_base(files, config, base)
    return ImportPlan(name=name, spec=spec, data=read_domain_data(spec, data), files=files, config=config)


def _check_base(files: AdapterFiles, config: AdapterConfig, record: BaseRecord) -> None:
    """Refuses an adapter that names another base model than the registry's.

    A name that is a folder on this machine is checked by the fingerprint of what is in it.

    Raises:
        IncompatibleError: The base model is another one, or it is not certain that it is the same.
    """
    named = config.base
    if named is not None and files.is_local and Path(named).expanduser().is_dir():
        found = fingerprint(Path(named).expanduser(), source=named)
        check_same_base(wanted=found, found=record, what=files.source)
        return
    fix = "if the weights are the same under another name, say so with --same-base"
    if named != record.id:
        cause = f"the adapter names {named!r}, the registry is for {record.id!r}"
        raise IncompatibleError(f"{files.source} was made for another base model.", cause=cause, fix=fix)
    if config.revision is not None and config.revision != record.revision:
        cause = f"the adapter names revision {config.revision!r} of {named}, the registry is for {record.revision!r}"
        raise IncompatibleError(f"{files.source} was made for another base model.", cause=cause, fix=fix)


def read_adapter(source: str) -> AdapterFiles:
    """The adapter in a folder, or on the Hub: `owner/repo`, `owner/repo/sub/folder`, each with `@revision` if wanted.

    Raises:
        NotFoundError: There is no such folder, or no adapter in it.
        IncompatibleError: Its weights are a pickle, which could run code, or its config is too large to be one.
        RemoteError: The Hub cannot be asked, or has no such repository.
        IntegrityError: What came from the Hub is not what it announced.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _read_folder(folder, source)
    path, at, revision = source.removeprefix(REMOTE_PREFIX).partition("@")
    parts = path.split("/")
    if len(parts) < 2 or source.startswith((".", "/", "~")):
        raise NotFoundError(
            f"There is no adapter at {source}.",
            cause="it is neither a folder nor a repository of the Hub, such as owner/repo",
            fix="give the folder that PEFT's save_pretrained wrote",
        )
    ref = RemoteRef("/".join(parts[:2]), revision if at else None)
    return _read_remote(ref, "".join(f"{part}/" for part in parts[2:]))


def _read_folder(folder: Path, source: str) -> AdapterFiles:
    _check_listing({path.name for path in folder.iterdir()}, source=source)
    _check_size((folder / ADAPTER_CONFIG).stat().st_size, source=source)
    config, tensors = (folder / ADAPTER_CONFIG).read_bytes(), (folder / ADAPTER_TENSORS).read_bytes()
    return AdapterFiles(source=source, config=config, tensors=tensors)


def _read_remote(ref: RemoteRef, inside: str) -> AdapterFiles:
    """The two files at one commit, each compared with what the Hub announced."""
    from ..hub.client import Hub

    hub = Hub()
    source = f"{ref.repo}/{inside}".rstrip("/")
    snapshot = hub.snapshot(ref, marker=f"{inside}{ADAPTER_CONFIG}")
    files = snapshot.files
    if files is not None:
        _check_listing({path.removeprefix(inside) for path in files if path.startswith(inside)}, source=source)
        _check_size(files[f"{inside}{ADAPTER_CONFIG}"].size, source=source)

    def fetch(name: str) -> bytes:
        announced = None if files is None else files[f"{inside}{name}"]
        return hub.fetch(
            snapshot, f"{inside}{name}", is_valid=lambda data: announced is None or announced.matches(data)
        )

    config, tensors = fetch(ADAPTER_CONFIG), fetch(ADAPTER_TENSORS)
    return AdapterFiles(source=source, config=config, tensors=tensors, commit=snapshot.commit, is_local=False)


def _check_listing(names: set[str], *, source: str) -> None:
    """Refuses what is no adapter, or one without safetensors."""
    if ADAPTER_CONFIG in names and ADAPTER_TENSORS in names:
        return
    if ADAPTER_CONFIG in names and PICKLE_FILE in names:
        raise IncompatibleError(
            f"{source}: this adapter cannot be imported.",
            cause=f"its weights are in {PICKLE_FILE}, a pickle: reading it can run any code",
            fix="load it with PEFT where you trust it, and save it again: model.save_pretrained(folder)",
        )
    missing = next(name for name in (ADAPTER_CONFIG, ADAPTER_TENSORS) if name not in names)
    fix = "give the folder that PEFT's save_pretrained wrote"
    raise NotFoundError(f"There is no adapter at {source}.", cause=f"no file {missing}", fix=fix)


def _check_size(size: int, *, source: str) -> None:
    if size > MAX_BYTES:
        cause = f"{ADAPTER_CONFIG} has {size} bytes; at most {MAX_BYTES} are read"
        raise IncompatibleError(f"{source}: this adapter cannot be imported.", cause=cause)
