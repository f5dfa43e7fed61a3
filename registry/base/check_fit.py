"""Whether a pack fits the base model in memory: fingerprints say that it was made for it, here is whether it can be."""

from torch import nn

from ...domains.base_model import linear_shape, target_modules
from ...domains.errors import IntegrityError
from ..pack.pack import DomainPack
from .load import LoadedBase


def check_fit(pack: DomainPack, base: LoadedBase, *, source: str) -> None:
    """Refuses experts of layers or modules that the base does not have, or of other widths.

    Raises:
        IntegrityError: Names the first place where they do not fit, with both values.
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
            raise _unfit(source, f"its {what}: {found}, those of the base: {expected}")
    known = target_modules(base.model, layout)
    for index, layer in bank.layers.items():
        module = base.model.get_submodule(f"{layout.layers}.{index}")
        for target in layer.A:
            found = layer.A[target].shape[1], layer.B[target].shape[0]
            expected = _shape(module, target) if target in known else None
            if found != expected:
                raise _unfit(source, f"{target} of layer {index} has widths {found}, in the base {expected}")


def _shape(layer: nn.Module, target: str) -> tuple[int, int] | None:
    try:
        return linear_shape(layer.get_submodule(target))
    except AttributeError:  # only other layers have it
        return None


def _equal(found: int, expected: int) -> tuple[bool, int, int]:
    return found == expected, found, expected


def _unfit(source: str, cause: str) -> IntegrityError:
    return IntegrityError(
        f"{source} does not fit the base model that it names.", cause=cause, fix="tell the maker of the pack"
    )
