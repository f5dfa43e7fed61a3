"""What a bank of experts looks like before it is trained."""

import math
from dataclasses import dataclass

from ..domains.errors import InputError


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """The shape of a new bank; stored in its pack."""

    rank: int = 4  # of each expert
    alpha: float = 8.0  # update = scale * B A x with scale = alpha / rank (alpha / sqrt(rank) for rsLoRA)
    method: str = "lora"  # or "rslora"
    experts: float = 2.0  # mean over the layers that carry any
    schedule: str = "linear"  # see adapters/allocation.py
    expert_free: float = 0.0  # fraction of the depth, from the input, without experts
    targets: tuple[str, ...] | None = None  # last parts of module paths; None = all linear modules
    rank_gates: bool = True  # rank-wise decoupling

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "experts"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be positive, found {value}.")
        if self.method not in ("lora", "rslora"):
            raise InputError(f"There is no LoRA method named {self.method!r}.", fix="use 'lora' or 'rslora'")


def lora_scale(alpha: float, rank: int, method: str) -> float:
    """The scale alpha / r of Hu et al. 2021 (arXiv:2106.09685), or alpha / sqrt(r) for rsLoRA.

    rsLoRA: Kalajdzievski 2023 (arXiv:2312.03732).
    """
    return alpha / rank**0.5 if method == "rslora" else alpha / rank
