"""The public API: `from lorary.registry import Registry`. Importing it is light; torch comes with the first model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..domains.errors import LoraryError as LoraryError
from .registry import Registry as Registry

if TYPE_CHECKING:
    from ..adapters.config import BankConfig as BankConfig
    from ..adapters.config import TrainingConfig as TrainingConfig

    __version__: str

__all__ = ["BankConfig", "LoraryError", "Registry", "TrainingConfig", "__version__"]

_LAZY = {"BankConfig": "..adapters.config", "TrainingConfig": "..adapters.config"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("lorary")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
