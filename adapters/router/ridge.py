"""Ridge evidence: regression of the slot on hashed token features, in closed form from additive second moments.

With G the mean of the slots' second moments of rows x (hashed_rows.py), and C their means, centred over the slots,

    W = (G + lambda I)^-1 C

(ridge regression of the slot's indicator; ACIL, Zhuang et al. 2022; RanPAC, McDonnell et al. 2023). G is known by its
largest eigenpairs, so W takes a linear system of the number of eigenpairs (Woodbury). If the residuals were normal with
variance v, W^T x / v would be the log odds of the slots (as in discriminant analysis), so the evidence is scaled by
1 / v, with v estimated by generalised cross-validation (Golub, Heath and Wahba 1979): where tokens say little about the
slot, as in short pieces of running text, they weigh little.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ...domains.statistics.hashed_rows import HashedRows
from ...domains.statistics.hashing import HASHED

SHRINKAGE = 0.1  # lambda, as a multiple of the mean of G's diagonal
LEAST_RESIDUAL = 0.15  # of the variance: rows of one text are alike, so that little text is fitted too well
MOST_PAIRS = 768  # of all slots together, the largest; time grows with their square


def ridge_weights(slots: Sequence[HashedRows]) -> Float[Tensor, "hashed slots"]:
    """Return W / v in float32; the result does not depend on the order of the slots, up to rounding."""
    count = len(slots)
    if count < 2 or min(part.rows for part in slots) == 0:
        return torch.zeros(HASHED, count)
    factors, cut = _joint_factors(slots)
    means = torch.stack([part.mean for part in slots], dim=1) / count
    centred = means - means.mean(1, keepdim=True)
    level = (SHRINKAGE * (factors.square().sum().item() + cut) + cut) / HASHED
    inner = factors @ factors.T
    inner.diagonal().add_(level)
    root = torch.linalg.cholesky(inner)
    weights = (centred - factors.T @ torch.cholesky_solve(factors @ centred, root)) / level
    return weights / _residual_variance(weights, centred, factors, cut, level, root, slots)


def _joint_factors(slots: Sequence[HashedRows]) -> tuple[Float[Tensor, "pairs hashed"], float]:
    """Return F with F^T F = G but for a part of trace `cut`, taken to be the same in all directions."""
    sizes = torch.cat([torch.linalg.vector_norm(part.factors, dim=1, dtype=torch.float32).square() for part in slots])
    keep = torch.zeros(len(sizes), dtype=torch.bool)
    keep[sizes.argsort(descending=True, stable=True)[:MOST_PAIRS]] = True
    of_slots = keep.split([len(part.factors) for part in slots])
    factors = torch.cat([part.factors[kept].float() for part, kept in zip(slots, of_slots, strict=True)])
    cut = (sum(part.cut for part in slots) + sizes[~keep].sum().item()) / len(slots)
    return factors / len(slots) ** 0.5, cut


def _residual_variance(
    weights: Tensor,
    centred: Tensor,
    factors: Tensor,
    cut: float,
    level: float,
    root: Tensor,
    slots: Sequence[HashedRows],
) -> float:
    """Return the variance of a slot's indicator around its regression, by generalised cross-validation."""
    count = len(slots)
    whole = 1 - 1 / count  # of the centred indicators, summed over the slots
    moved = factors.T @ (factors @ weights) + cut / HASHED * weights  # G W
    residual = whole - 2 * (weights * centred).sum().item() + (weights * moved).sum().item()
    used = len(factors) - level * torch.cholesky_inverse(root).trace().item()  # degrees of freedom
    # rows of slots with much text count less, since each slot has the same weight
    rows = count**2 / sum(1 / part.rows for part in slots)
    free = max(1 - used / rows, 0.05)
    return min(max(residual / free**2, LEAST_RESIDUAL * whole), whole) / count
