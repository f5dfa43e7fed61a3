"""lorary: a continual-learning registry of LoRA experts for language models.

The public API is that of `lorary.registry`; its names can be imported from here as well: `from lorary import Registry`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .registry import BankConfig as BankConfig
    from .registry import LoraryError as LoraryError
    from .registry import Registry as Registry
    from .registry import TrainingConfig as TrainingConfig

    __version__: str

__all__ = ["BankConfig", "LoraryError", "Registry", "TrainingConfig", "__version__"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import registry

        return getattr(registry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
