"""Learn, compose and measure in the usual state of torch, whatever stands around the call.

Inside `torch.no_grad()` nothing can be trained. A base model that is loaded inside `torch.inference_mode()` can never
be trained on. Inside `torch.autocast()` statistics, gradients and scores are other numbers, which would be stored.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def in_usual_torch_state(call: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Decorate what loads the base model, or whose results are stored: with gradients, without autocast."""

    @wraps(call)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        if "torch" not in sys.modules:  # then it is in no other state, and need not be imported
            return call(*args, **kwargs)
        import torch

        with ExitStack() as state:
            state.enter_context(torch.inference_mode(False))
            state.enter_context(torch.enable_grad())
            for kind in ("cpu", "cuda", "mps"):
                if torch.is_autocast_enabled(kind):
                    state.enter_context(torch.autocast(kind, enabled=False))
            return call(*args, **kwargs)

    return run
