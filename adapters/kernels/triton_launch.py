"""What every launch of a Triton kernel asks: how the long axis is cut, and whether this is Triton's interpreter."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton

PROCESSORS = 132  # of an H100 or H200: as many programs keep it busy
MAX_SHARES = 16
FEW_TOKENS = 16  # up to so many, products are bound by the weights' bytes
IS_INTERPRETED = triton.knobs.runtime.interpret  # Triton's interpreter has no dot of bfloat16


@dataclass(frozen=True)
class Tiles:
    """How launches are cut into programs."""

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
    """Tiles for so many tokens: a dot has 16 rows at least, and few tokens need no more."""
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


def kernel(function: Callable) -> Any:
    """Triton reads a function's own source, not that of what a type checker wraps around it."""
    return triton.jit(inspect.unwrap(function))


def count_shares(width: int, step: int, programs: int, *, wanted: int = PROCESSORS) -> int:
    """Into how many shares a long axis is cut, so that all processors have work; a share has two steps at least.

    A power of two: kernels are compiled for each number of shares, and every length of a prompt would bring another.

    Args:
        width: Of the axis.
        step: How much of it one turn of the kernel's loop reads.
        programs: Of each share.
        wanted: Programs altogether. To be read as fast as memory allows, weights want several for each processor.
    """
    steps = triton.cdiv(width, step)
    most = max(1, min(MAX_SHARES, wanted // programs, steps // 2))
    return 1 << (most.bit_length() - 1)


def share_size(width: int, step: int, shares: int) -> int:
    """How much of the axis a share has: whole steps."""
    return triton.cdiv(triton.cdiv(width, step), shares) * step
