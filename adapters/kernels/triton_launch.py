"""Launch parameters of the Triton kernels: tiles, split-K, and whether Triton's interpreter runs them."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton

NUM_SMS = 132  # streaming multiprocessors of an H100 or H200
MAX_SPLIT_K = 16
FEW_TOKENS = 16  # up to here products are bound by the bandwidth of reading weights
IS_INTERPRETED = triton.knobs.runtime.interpret  # Triton's interpreter has no bfloat16 dot


@dataclass(frozen=True)
class Tiles:
    """Tile sizes and warps of the launches."""

    shrink_m: int = 64
    shrink_c: int = 64
    shrink_k: int = 64
    expand_m: int = 64
    expand_n: int = 128
    expand_r: int = 32
    score_m: int = 64
    score_c: int = 64
    score_k: int = 64
    shrink_warps: int = 8
    expand_warps: int = 8
    score_warps: int = 8


def choose_tiles(tokens: int) -> Tiles:
    """Return the tiles for a number of tokens; 16 rows is the minimum of a dot."""
    few = {
        "shrink_c": 32,
        "shrink_k": 128,
        "shrink_warps": 4,
        "expand_warps": 4,
        "score_c": 32,
        "score_k": 128,
        "score_warps": 4,
    }
    if tokens <= FEW_TOKENS:
        return Tiles(shrink_m=16, expand_m=16, expand_n=64, score_m=16, **few)
    if tokens <= 256:
        return Tiles(shrink_m=32, expand_m=32, score_m=32, **few)
    return Tiles()


def jit(function: Callable) -> Any:
    """Apply `triton.jit` to a function without its wrappers: Triton reads the source, runtime type checks wrap it."""
    return triton.jit(inspect.unwrap(function))


def choose_split_k(width: int, step: int, programs: int, *, target: int = NUM_SMS) -> int:
    """Return the number of parts of a long axis, so that all processors are busy; each has at least two steps.

    It is a power of two: kernels are compiled for each number of parts, and with every prompt length it could differ.

    Args:
        width: Length of the axis.
        step: Length that one iteration of the kernel's loop reads.
        programs: Number of programs per part.
        target: Total number of programs. Products bound by memory bandwidth need several per processor.
    """
    steps = triton.cdiv(width, step)
    maximum = max(1, min(MAX_SPLIT_K, target // programs, steps // 2))
    return 1 << (maximum.bit_length() - 1)


def split_size(width: int, step: int, parts: int) -> int:
    """Return the length of each part of the axis, a multiple of `step`."""
    return triton.cdiv(triton.cdiv(width, step), parts) * step
