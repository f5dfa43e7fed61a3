"""Read a PEFT adapter and the text of its domain, from a folder or the Hub, and check both before torch is loaded.

Only adapter_config.json and safetensors are read; nothing from the adapter is executed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ...domains.data.catalog import builtin_domains
from ...domains.data.corpus import Source
from ...domains.data.spec import DomainSpec
from ...domains.errors import IncompatibleError, NotFoundError
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
    """Bytes of a saved adapter."""

    source: str  # as the user named it
    config: bytes
    tensors: bytes
    commit: str | None = None  # Hub commit; None for a folder
    is_local: bool = True

    @property
    def digests(self) -> dict[str, str]:
        """Digest of each file, by file name."""
        return {ADAPTER_CONFIG: sha256_of(self.config), ADAPTER_TENSORS: sha256_of(self.tensors)}


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """Adapter and text of a new domain."""

    name: str
    spec: DomainSpec
    data: DomainData | None  # None: it comes without text, and is not routed
    files: AdapterFiles
    config: AdapterConfig


def plan_import(
    store: Store, name: str, source: str, data: Sequence[Source], *, base: BaseRecord | None, raw: bool = False
) -> ImportPlan:
    """Read and check the adapter and the text of a new domain.

    A built-in domain has text of its own. Without any the adapter is not routed: its factors alone do not tell which
    text it is for (docs/log.md).

    Args:
        base: Base model that the adapter must name; None skips this check.
        raw: Whether prompts and completions are read without the base's chat template.

    Raises:
        LoraryError: The name, the data or the adapter is not valid; see `check_new_name`, `read_domain_data`,
            `read_adapter` and `read_config`.
    """
    check_new_name(store, name)
    has_text = bool(data) or name in builtin_domains()
    files = read_adapter(source)
    config = read_config(files.config, source=f"{source}: {ADAPTER_CONFIG}")
    # the license of a built-in domain is that of its text, not of the adapter
    bare = DomainSpec(name=name, description=f"{name}, imported without text", license=UNKNOWN_LICENSE)
    spec = replace(spec_of(name, data), license=UNKNOWN_LICENSE) if has_text else bare
    if base is not None:
        _check_base(files, config, base)
    text = read_domain_data(spec, data, raw=raw) if has_text else None
    return ImportPlan(name=name, spec=spec, data=text, files=files, config=config)


def _check_base(files: AdapterFiles, config: AdapterConfig, record: BaseRecord) -> None:
    """Raise if the adapter names another base model than the registry's.

    If the name is a local folder, the fingerprint of the folder is compared.

    Raises:
        IncompatibleError: It is another base model, or cannot be told to be the same.
    """
    named = config.base
    if named is not None and files.is_local and Path(named).expanduser().is_dir():
        # its files are compared only, nothing of it is loaded
        found = fingerprint(Path(named).expanduser(), source=named, trust_remote_code=True)
        check_same_base(wanted=found, found=record, what=files.source)
        return
    fix = "if the weights are the same under another name, pass --same-base"
    if named != record.id:
        cause = f"the adapter names {named!r}, the registry is for {record.id!r}"
        raise IncompatibleError(f"{files.source} was made for another base model.", cause=cause, fix=fix)
    if config.revision is not None and config.revision != record.revision:
        cause = f"the adapter names revision {config.revision!r} of {named}, the registry is for {record.revision!r}"
        raise IncompatibleError(f"{files.source} was made for another base model.", cause=cause, fix=fix)


def read_adapter(source: str) -> AdapterFiles:
    """Read an adapter from a folder or the Hub.

    Args:
        source: A folder, `owner/repo` or `owner/repo/sub/folder`; on the Hub optionally with `@revision`.

    Raises:
        NotFoundError: The folder does not exist, or contains no adapter.
        IncompatibleError: Its weights are a pickle, which could run code, or its config is too large.
        RemoteError: The Hub request failed, or there is no such repository.
        IntegrityError: A downloaded file does not match its size or digest on the Hub.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _read_folder(folder, source)
    path, at, revision = source.removeprefix(REMOTE_PREFIX).partition("@")
    parts = path.split("/")
    if len(parts) < 2 or source.startswith((".", "/", "~")):
        raise NotFoundError(
            f"There is no adapter at {source}.",
            cause="it is neither a folder nor a Hub repository (owner/repo)",
            fix="pass the folder written by PEFT's save_pretrained",
        )
    ref = RemoteRef("/".join(parts[:2]), revision if at else None)
    return _read_hub(ref, "".join(f"{part}/" for part in parts[2:]))


def _read_folder(folder: Path, source: str) -> AdapterFiles:
    _check_listing({path.name for path in folder.iterdir()}, source=source)
    _check_size((folder / ADAPTER_CONFIG).stat().st_size, source=source)
    config, tensors = (folder / ADAPTER_CONFIG).read_bytes(), (folder / ADAPTER_TENSORS).read_bytes()
    return AdapterFiles(source=source, config=config, tensors=tensors)


def _read_hub(ref: RemoteRef, prefix: str) -> AdapterFiles:
    """Read both files at one commit, each compared with its size and digest on the Hub."""
    from ..hub.client import Hub

    hub = Hub()
    source = f"{ref.repo}/{prefix}".rstrip("/")
    snapshot = hub.snapshot(ref, marker=f"{prefix}{ADAPTER_CONFIG}")
    files = snapshot.files
    if files is not None:
        _check_listing({path.removeprefix(prefix) for path in files if path.startswith(prefix)}, source=source)
        _check_size(files[f"{prefix}{ADAPTER_CONFIG}"].size, source=source)

    def fetch(name: str) -> bytes:
        path = f"{prefix}{name}"
        return hub.fetch(snapshot, path, is_valid=lambda data: files is None or files[path].matches(data))

    config, tensors = fetch(ADAPTER_CONFIG), fetch(ADAPTER_TENSORS)
    return AdapterFiles(source=source, config=config, tensors=tensors, commit=snapshot.commit, is_local=False)


def _check_listing(names: set[str], *, source: str) -> None:
    """Raise if the adapter is incomplete or has no safetensors."""
    if ADAPTER_CONFIG in names and ADAPTER_TENSORS in names:
        return
    if ADAPTER_CONFIG in names and PICKLE_FILE in names:
        raise IncompatibleError(
            f"{source}: this adapter cannot be imported.",
            cause=f"its weights are in {PICKLE_FILE}, a pickle, and loading it can run arbitrary code",
            fix="if you trust it, load it with PEFT and save it again: model.save_pretrained(folder)",
        )
    missing = next(name for name in (ADAPTER_CONFIG, ADAPTER_TENSORS) if name not in names)
    fix = "pass the folder written by PEFT's save_pretrained"
    raise NotFoundError(f"There is no adapter at {source}.", cause=f"no file {missing}", fix=fix)


def _check_size(size: int, *, source: str) -> None:
    if size > MAX_BYTES:
        cause = f"{ADAPTER_CONFIG} has {size} bytes; the limit is {MAX_BYTES}"
        raise IncompatibleError(f"{source}: this adapter cannot be imported.", cause=cause)
