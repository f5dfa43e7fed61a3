"""The public API: `from lorary.registry import Registry`. Importing it is light; torch comes with the first model."""

from typing import TYPE_CHECKING

from ..adapters.config import BankConfig as BankConfig
from ..adapters.config import TrainingConfig as TrainingConfig
from ..domains.errors import LoraryError as LoraryError
from .registry import Registry as Registry

if TYPE_CHECKING:
    __version__: str

__all__ = ["BankConfig", "LoraryError", "Registry", "TrainingConfig", "__version__"]


def __getattr__(name: str) -> str:
    if name == "__version__":
        from importlib.metadata import version

        return version("lorary")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
