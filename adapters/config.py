"""Settings of a new bank and of its training: the two configurations that users pass in and packs store."""

import math
from dataclasses import dataclass, replace
from typing import Final

from ..domains.errors import InputError

LEARNING_RATE_TIMES_WIDTH: Final = 2.0  # 0.01 at width 192 (measured, docs/log.md), 5e-4 at 4096, as usual for LoRA
_MIN_VALUES: Final = {
    "steps": 1,
    "least_steps": 1,
    "most_steps": 1,
    "block": 2,  # the first token of a block is never predicted
    "batch": 1,
    "accumulation": 1,
    "checkpoint_every": 1,
    "patience": 0,
}


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """Shape of a new bank; stored in its pack."""

    rank: int = 4  # of each expert
    alpha: float = 8.0  # update = scale * B A x with scale = alpha / rank (alpha / sqrt(rank) for rsLoRA)
    method: str = "lora"  # or "rslora"
    experts: float = 2.0  # mean over the layers that have any
    schedule: str = "linear"  # see adapters/allocation.py
    expert_free: float = 0.0  # fraction of the layers, from the input, without experts
    targets: tuple[str, ...] | None = None  # last parts of module paths; None: all linear modules
    rank_gates: bool = True  # one gate for each rank besides the expert gates

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise InputError("targets must be a tuple of names.", fix=f"targets=({self.targets!r},)")
        _check_integer("rank", self.rank)
        for name in ("rank", "alpha", "experts"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be positive, found {value}.")
        if self.method not in ("lora", "rslora"):
            raise InputError(f"There is no LoRA method named {self.method!r}.", fix="use 'lora' or 'rslora'")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Hyperparameters of one training run; stored in the pack."""

    steps: int | None = None  # optimizer steps; None: enough for `epochs`, clamped to the two bounds below
    epochs: float = 4.0
    least_steps: int = 40
    most_steps: int = 1000
    block: int = 256  # tokens
    batch: int = 8  # blocks per device and micro-batch
    accumulation: int = 1  # micro-batches per optimizer step
    learning_rate: float | None = None  # peak; None: LEARNING_RATE_TIMES_WIDTH / hidden size
    warmup: float = 0.06  # fraction of the steps
    balance: float = 0.01  # weight of the load-balancing loss inside the bank
    validation: float = 0.0  # share of the rows, by document, that is left out of training to measure it by
    patience: int = 3  # points of the validation curve without a better one after which training ends; 0: never
    seed: int = 0
    checkpoint_every: int = 50  # steps; and every two minutes
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in (*_MIN_VALUES, "seed"):
            _check_integer(name, getattr(self, name))
        for name, minimum in _MIN_VALUES.items():
            if getattr(self, name) is not None and getattr(self, name) < minimum:
                raise InputError(f"{name} must be at least {minimum}, found {getattr(self, name)}.")
        for name in ("epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be positive, found {value}.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed must be at least 0 and below 2**32, found {self.seed}.")
        if not 0 <= self.validation <= 0.5:
            raise InputError(f"validation must be in [0, 0.5], found {self.validation}.")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"warmup must be in [0, 1], found {self.warmup}.")
        if not (math.isfinite(self.balance) and self.balance >= 0):
            raise InputError(f"balance must be 0 or more, found {self.balance}.")

    def for_width(self, width: int) -> "TrainingConfig":
        """Return a copy whose learning rate, if unset, is derived from the base model's hidden size."""
        return self if self.learning_rate else replace(self, learning_rate=LEARNING_RATE_TIMES_WIDTH / width)

    def planned_steps(self, blocks: int) -> int:
        """Return the number of optimizer steps for a training set of `blocks` blocks."""
        if self.steps is not None:
            return self.steps
        wanted = round(blocks * self.epochs / (self.batch * self.accumulation))
        return min(self.most_steps, max(self.least_steps, wanted))


def _check_integer(name: str, value: object) -> None:
    if value is not None and not isinstance(value, int):
        raise InputError(f"{name} must be an integer, found {value!r}.")


def lora_scale(alpha: float, rank: int, method: str) -> float:
    """Return alpha / r for LoRA or alpha / sqrt(r) for rsLoRA.

    LoRA: Hu et al. 2021 (arXiv:2106.09685). rsLoRA: Kalajdzievski 2023 (arXiv:2312.03732).
    """
    return alpha / rank**0.5 if method == "rslora" else alpha / rank
