"""HashedRows: second moments of hashed token features, for the ridge evidence of the router.

A row describes a text at one position: psi, the faded sum of the signed hashed features of its tokens and pairs
(Weinberger et al. 2009), divided by the root of their number. Of a domain's rows the mean and the largest eigenpairs of
the mean of outer products are kept, and the trace of what is cut.
"""

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float, Float16, Float32
from torch import Tensor

from .hashing import HASHED

EIGENPAIRS: Final = 128
MAX_ROWS: Final = 4096  # of a text; more are sampled evenly
_OVERSAMPLING, _ITERATIONS, _SEED = 32, 4, 20261201


@dataclass(frozen=True)
class HashedRows:
    """Mean and second moments of the hashed features of a domain's text."""

    rows: float  # number of rows
    mean: Float32[Tensor, " hashed"]
    factors: Float16[Tensor, "pairs hashed"]  # eigenvectors times roots of their eigenvalues, largest first
    cut: float  # trace of the second moments that the factors leave out

    def __add__(self, other: "HashedRows") -> "HashedRows":
        if not other.rows or not self.rows:
            return self if self.rows else other
        total = self.rows + other.rows
        shares = self.rows / total, other.rows / total
        weighted = [part.factors.float() * share**0.5 for part, share in zip((self, other), shares, strict=True)]
        factors, cut = _largest(torch.cat(weighted))
        mean = (self.mean.double() * shares[0] + other.mean.double() * shares[1]).float()
        return HashedRows(total, mean, factors, _rounded(shares[0] * self.cut + shares[1] * other.cut + cut))


def no_hashed_rows() -> HashedRows:
    """Return the moments of no text."""
    return HashedRows(0.0, torch.zeros(HASHED), torch.zeros(0, HASHED, dtype=torch.float16), 0.0)


def hashed_moments(rows: Float[Tensor, "rows hashed"]) -> HashedRows:
    """Return the moments of rows; no more than `MAX_ROWS` are used."""
    if not len(rows):
        return no_hashed_rows()
    if len(rows) > MAX_ROWS:
        rows = rows[torch.linspace(0, len(rows) - 1, MAX_ROWS).round().long()]
    factors, cut = _largest(rows / len(rows) ** 0.5)
    return HashedRows(float(len(rows)), rows.mean(0), factors, cut)


def _largest(rows: Float[Tensor, "rows hashed"]) -> tuple[Float16[Tensor, "pairs hashed"], float]:
    """Return the largest eigenpairs of rows^T rows, and the trace of the rest.

    By randomized subspace iteration (Halko, Martinsson and Tropp 2011) where there are many more rows than pairs.
    """
    whole = rows.square().sum(dtype=torch.float64).item()
    sketch = EIGENPAIRS + _OVERSAMPLING
    if len(rows) > 2 * sketch:
        start = torch.randn(rows.shape[1], sketch, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float32)
        basis = torch.linalg.qr(start).Q
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
        rows = (rows @ basis).T @ (rows @ basis)
        values, vectors = torch.linalg.eigh(rows.double())
        vectors = basis.double() @ vectors
    else:
        values, mixes = torch.linalg.eigh((rows @ rows.T).double())
        vectors = rows.double().T @ mixes / values.clamp(min=1e-30).sqrt()
    order = values.argsort(descending=True)[:EIGENPAIRS]
    order = order[values[order] > 1e-9 * max(whole, 1e-30)]
    factors = (vectors[:, order] * values[order].clamp(min=0).sqrt()).T
    # an eigenvector may point either way
    largest = factors.gather(1, factors.abs().argmax(1, keepdim=True)) if len(order) else factors
    factors = (factors * largest.sign()).to(torch.float16).contiguous() if len(order) else factors.to(torch.float16)
    return factors, _rounded(max(0.0, whole - factors.double().square().sum().item()))


def _rounded(value: float) -> float:
    return float(f"{value:.9g}")
