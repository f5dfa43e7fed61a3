"""Recognise linear modules, quantised ones included, and find the tensors that quantised ones keep out of sight.

bitsandbytes keeps int8 weights in a state object beside the module, GPTQ and AWQ in buffers, torchao in a subclass of
Tensor. All have `in_features` and `out_features`, the shape before quantisation.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_ORDINARY = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def linear_modules(module: nn.Module) -> list[str]:
    """Return the paths of the linear modules in `module`, in order."""
    return [path for path, part in module.named_modules() if is_linear(part)]


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is linear: nn.Linear, GPT-2's Conv1D, or a module that stores a quantised matrix."""
    return isinstance(module, nn.Linear | Conv1D) or _stores_integers(module)


def is_quantised(module: nn.Module) -> bool:
    """Return whether a linear module's weight is not an ordinary matrix of floating-point numbers."""
    if isinstance(module, Conv1D) or not is_linear(module):
        return False
    weight: Any = getattr(module, "weight", None)
    is_ordinary = type(weight) in (nn.Parameter, Tensor) and weight.ndim == 2 and weight.dtype in _ORDINARY
    return not is_ordinary or _stores_integers(module)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out) of a linear module, before quantisation; Conv1D stores its weight transposed."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.nf
    assert is_linear(module)
    found: Any = module
    return found.in_features, found.out_features


def hidden_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of a quantised linear module that are not parameters: buffers, and those of state objects."""
    yield from module.buffers(recurse=False)
    seen: set[int] = set()
    for value in [*vars(module).values(), *(vars(p) for p in module.parameters(recurse=False))]:
        yield from _tensors_in(value, seen)


def settle(model: nn.Module) -> None:
    """Bring the quantised modules of a loaded model into a state that no forward pass changes.

    bitsandbytes moves weights into its state object and casts biases in the first forward pass, where threads race, and
    packs 4-bit weights for the CPU in the first one without gradients, after which no gradient passes.
    """
    with torch.no_grad():
        for module in model.modules():
            if is_quantised(module):
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
                first = next(iter([*module.parameters(), *module.buffers()]))
                dtype: Any = getattr(model, "dtype", torch.float32)
                module(torch.zeros(1, linear_shape(module)[0], dtype=dtype, device=first.device))


def _stores_integers(module: nn.Module) -> bool:
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if not all(type(size) is int for size in sizes) or next(module.children(), None) is not None:
        return False
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(not tensor.dtype.is_floating_point and tensor.dtype != torch.bool for tensor in own)


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(value) in seen or isinstance(value, nn.Module | type) or callable(value):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for part in [*inner, *getattr(value, "__dict__", {}).values()]:
        yield from _tensors_in(part, seen)
