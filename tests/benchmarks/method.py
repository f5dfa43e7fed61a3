"""What the methods of the benchmark have in common: what they get, and the steps they give back."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streams import Domain
from torch import nn
from transformers import PreTrainedModel

from lorary.adapters.config import TrainingConfig
from lorary.domains.progress import OnProgress
from lorary.registry.base.load import LoadedBase

SCHEMA = 1  # counted up when what was trained before would not be trained the same way again


@dataclass(frozen=True)
class Scored:
    """A model that is to be scored: built only if its score is not known yet."""

    id: str  # two models with the same id score the same
    build: Callable[[], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Step:
    """The state of a method after one domain was added."""

    name: str
    model_for: Callable[[str], Scored]  # by column: an oracle may choose by domain, others may not
    trained_parameters: int
    seconds: float  # of training
    steps: int
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all methods share."""

    base: LoadedBase
    domains: Sequence[Domain]  # in the order in which they are learned
    recipe: TrainingConfig
    out: Path
    general: Path | None  # text that lorary's KP bank learns from; None: the bundled corpus
    on_progress: OnProgress

    def fresh_base(self) -> PreTrainedModel:
        """A base model that may be written into."""
        return LoadedBase(self.base.folder).model

    @property
    def base_scored(self) -> Scored:
        """The bare base model."""
        return Scored("base", lambda: self.base.model)


def digest(origin: Any) -> str:
    """A short name for all that something was made from."""
    return hashlib.sha256(json.dumps([SCHEMA, origin], sort_keys=True).encode()).hexdigest()[:16]
