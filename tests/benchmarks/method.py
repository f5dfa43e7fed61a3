"""Inputs and results that all methods of the benchmark share."""

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

SCHEMA = 1  # increase when stored adapters would be trained differently


@dataclass(frozen=True)
class Scored:
    """A model to score, built only if its score is not stored yet."""

    id: str  # models with equal ids have equal scores
    build: Callable[[], nn.Module]


@dataclass(frozen=True, kw_only=True)
class Step:
    """State of a method after one domain was added."""

    name: str
    model_for: Callable[[str], Scored]  # by column; only the oracle may depend on it
    trained_parameters: int
    seconds: float  # of training
    steps: int
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Base model, domains and settings of a run."""

    base: LoadedBase
    domains: Sequence[Domain]  # in training order
    recipe: TrainingConfig
    out: Path
    general: Path | None  # training text of lorary's KP bank; None: the bundled corpus
    on_progress: OnProgress
    encoder: Path | None = None  # sentence encoder of LORAUTER; None: the base

    def fresh_base(self) -> PreTrainedModel:
        """Return a new copy of the base model that can be modified."""
        return LoadedBase(self.base.folder).model

    @property
    def base_scored(self) -> Scored:
        """Bare base model."""
        return Scored("base", lambda: self.base.model)


def digest(origin: Any) -> str:
    """Return a short digest of the inputs of an artifact."""
    return hashlib.sha256(json.dumps([SCHEMA, origin], sort_keys=True).encode()).hexdigest()[:16]
