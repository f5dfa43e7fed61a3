"""The base model of a registry, loaded at most once in a process and shared by everything composed over it."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...domains.base_model import ModelLayout, check_device, find_layout, load_base_model
from ..store.manifest import BaseRecord, check_same_base
from ..store.store import Store
from .fingerprint import find_base, fingerprint


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base model in memory."""

    folder: Path
    device: str = "cpu"
    dtype: str = "auto"

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_base_model(self.folder, device=self.device, dtype=self.dtype)

    @property
    def model(self) -> PreTrainedModel:
        """The model, frozen, in evaluation mode."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return self._loaded[1]

    @cached_property
    def layout(self) -> ModelLayout:
        """Where its decoder layers are."""
        return find_layout(self.model)


def open_base(store: Store, record: BaseRecord, *, device: str, dtype: str) -> LoadedBase:
    """The base model of a store, after its files were checked against the fingerprint; loaded on first use.

    Raises:
        IncompatibleError: The files are not those that the registry was made for, or the device is not there.
    """
    check_device(device)
    source = store.settings["source"]
    folder = find_base(source, revision=record.revision)
    cache = store.cache / "fingerprints.json" if os.access(store.cache, os.W_OK) else None
    found = fingerprint(folder, source=source, revision=record.revision, cache=cache)
    check_same_base(wanted=record, found=found, what=f"The registry {store.path}")
    return LoadedBase(folder, device=device, dtype=dtype)
