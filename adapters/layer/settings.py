"""Settings of a composed model, local to one thread or asyncio task.

`reading_prompts`, `fixed_slots` and `recording_routes` (routing.py) open them, in the thread that runs the forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor

_innermost: ContextVar["Settings"] = ContextVar("lorary_settings")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings for the forward passes of one composed model."""

    owner: Any = None  # the model's Routing
    outer: "Settings | None" = None  # enclosing settings of the same context, for this or another model
    prompts: Int64[Tensor, " rows"] | None = None  # length of each prompt that is read as a whole
    longest_prompt: int | None = None  # the largest length; None: all that a forward pass with an empty cache reads
    fixed: Float[Tensor, " slots"] | None = None  # constant slot gates
    routes: list[Any] | None = None  # receives a Route for each forward pass
    expert_use: list[Tensor] | None = None  # receives the trainable experts' gates of each layer

    # `ContextVar.get(self)`: the innermost settings of this context, or `self` if there are none. torch.compile cannot
    # trace a ContextVar, but it can read and guard a property over a C function.
    innermost = property(_innermost.get)


DEFAULTS = Settings()


def settings_of(owner: Any) -> Settings:
    """Return the settings of a model in the current context."""
    found: Settings = DEFAULTS.innermost
    while found.owner is not owner and found.outer is not None:
        found = found.outer
    return found


@contextmanager
def changed_settings(owner: Any, **changes: Any) -> Iterator[None]:
    """Change settings of one model in the current context until the block ends."""
    settings = replace(settings_of(owner), owner=owner, outer=DEFAULTS.innermost, **changes)
    token = _innermost.set(settings)
    try:
        yield
    finally:
        _innermost.reset(token)
