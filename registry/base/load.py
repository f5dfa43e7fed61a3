"""Load the base model of a registry, at most once per process, and check that packs fit it."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...domains.base_model import ModelLayout, check_device, find_layout, load_base_model
from ...domains.check_base import check_finite, check_special_tokens
from ...domains.data.prompt import prompt_ids
from ...domains.errors import IntegrityError
from ...domains.linear import linear_modules, linear_shape
from ...domains.statistics.token_roles import TokenRoles, token_roles
from ...domains.target_modules import Targets, find_targets, reasons_in_code
from ..pack.pack import DomainPack
from ..store.manifest import BaseRecord, check_same_base
from ..store.store import Store
from .find import find_base
from .fingerprint import fingerprint
from .torch_state import in_usual_torch_state


@dataclass(frozen=True)
class LoadedBase:
    """Frozen base model and its tokenizer, read from disk on first use."""

    folder: Path
    device: str = "cpu"
    dtype: str = "auto"  # as `choose_dtype` resolves it
    trust_remote_code: bool = False
    template_tokens: tuple[int, ...] | None = None  # those of the store's base record; None if it has none

    @cached_property
    @in_usual_torch_state
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_base_model(
            self.folder, device=self.device, dtype=self.dtype, trust_remote_code=self.trust_remote_code
        )

    @property
    def model(self) -> PreTrainedModel:
        """The frozen model in evaluation mode."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._loaded[1]

    def check(self, *, raw: bool) -> None:
        """Check once, before a registry is made, what digests keep from then on: weights, tokenizer, a forward pass.

        Args:
            raw: Leave out the chat template.

        Raises:
            IncompatibleError: A weight or what the model computes is not finite, or the tokenizer is of another model.
            InputError: The chat template cannot render a question.
        """
        check_finite(self.folder, self.model)
        check_special_tokens(self.folder, self.model, self.tokenizer)
        prompt_ids("a question", self.tokenizer, raw=raw)

    @cached_property
    def roles(self) -> TokenRoles:
        """The roles of the tokens in routing."""
        vocabulary = self.model.config.get_text_config().vocab_size
        return token_roles(self.tokenizer, vocabulary, self.template_tokens)

    @cached_property
    def layout(self) -> ModelLayout:
        """The location and number of the decoder layers."""
        return find_layout(self.model)

    @cached_property
    def targets(self) -> Targets:
        """The linear modules that can have experts, by decoder layer; found by two short forward passes."""
        return find_targets(self.model, self.layout)


def open_base(store: Store, record: BaseRecord, *, device: str, dtype: str) -> LoadedBase:
    """Return the base model of a store after checking its files against the fingerprint `record`.

    The weights are loaded on first use.

    Raises:
        IncompatibleError: The files differ from the fingerprint or bring code that was not trusted at `init`, or the
            device does not exist.
    """
    check_device(device)
    source = store.settings["source"]
    trusted = store.settings.get("trust_remote_code") is True
    folder = find_base(source, revision=record.revision, trust_remote_code=trusted)
    cache = store.cache / "fingerprints.json" if os.access(store.cache, os.W_OK) else None
    found = fingerprint(folder, source=source, revision=record.revision, trust_remote_code=trusted, cache=cache)
    check_same_base(wanted=record, found=found, what=f"The registry {store.path}")
    return LoadedBase(
        folder,
        device=device,
        dtype=dtype,
        trust_remote_code=trusted,
        template_tokens=record.template_tokens or None,
    )


def check_fit(pack: DomainPack, base: LoadedBase, *, source: str) -> None:
    """Raise if the experts of a pack do not match the layers, modules and widths of the base model.

    What only a forward pass shows is not checked here: a module called with other positions than its decoder layer is
    refused when it is called.

    A matching fingerprint states which base the pack was made for; this check finds a pack whose tensors contradict it.

    Args:
        source: The name of the pack in error messages.

    Raises:
        IntegrityError: Names the first mismatch with both values.
    """
    layout, bank = base.layout, pack.bank
    vocabulary = base.model.config.get_text_config().vocab_size
    sizes = {
        "layers": (max([*bank.layers, pack.feature_layer]) < layout.count, max(bank.layers) + 1, layout.count),
        "vocabulary": _equal(len(pack.statistics.token_counts), vocabulary),
        "width": _equal(next(iter(bank.layers.values())).expert_gate.shape[1], layout.width),
    }
    for what, (fits, found, expected) in sizes.items():
        if not fits:
            raise _misfit(source, f"{what}: {found} in the pack, {expected} in the base model")
    extended: dict[tuple[int, str], nn.Module] = {}
    for index, layer in bank.layers.items():
        module = base.model.get_submodule(f"{layout.layers}.{index}")
        for target in layer.A:
            found = layer.A[target].shape[1], layer.B[target].shape[0]
            expected = _shape(module, target)
            if found != expected:
                raise _misfit(
                    source, f"{target} of layer {index}: widths {found} in the pack, {expected} in the base model"
                )
            extended[index, target] = module.get_submodule(target)
    for (index, target), reason in reasons_in_code(base.model, layout, extended).items():
        raise _misfit(source, f"{target} of layer {index} cannot have experts: {reason}")


def _shape(layer: nn.Module, target: str) -> tuple[int, int] | None:
    """Return the shape of a linear module; None where the layer has none of this name."""
    return linear_shape(layer.get_submodule(target)) if target in linear_modules(layer) else None


def _equal(found: int, expected: int) -> tuple[bool, int, int]:
    return found == expected, found, expected


def _misfit(source: str, cause: str) -> IntegrityError:
    return IntegrityError(
        f"{source} does not fit the base model that its manifest names.",
        cause=cause,
        fix="ask the author of the pack for one made for this base model",
    )
