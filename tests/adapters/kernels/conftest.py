"""Inputs for every implementation and the comparison with the reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.adapters.kernels import reference
from lorary.adapters.kernels.group import GroupWeights

# tokens, d_in, d_out of each module, ranks of each module (None: all), total rank
SHAPES = {
    "one-token": (1, 24, (16,), None, 8),
    "ones": (1, 1, (1,), None, 1),
    "odd-sizes": (63, 33, (17, 65), None, 13),
    "three-modules": (100, 64, (64, 16, 16), None, 24),
    "mixed-ranks": (37, 40, (24, 48), ((0, 1, 2, 5, 6), (1, 3, 4, 5)), 7),
    "partly-missing-ranks": (5, 19, (7, 9, 11), ((0, 1), (2, 3, 4), (0, 1, 2, 3, 4)), 5),
    "many-tokens": (257, 48, (130,), None, 32),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Case:
    """Random inputs of one call."""

    def __init__(self, shape: str, dtype: torch.dtype, *, contiguous: bool = True, empty: bool = False, seed: int = 0):
        tokens, d_in, d_outs, chosen, rank = SHAPES[shape]
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=generator) * scale).to(dtype)

        def strided(tensor: Tensor) -> Tensor:
            """Return the same values, with a gap after every row if not `contiguous`."""
            return tensor if contiguous else torch.cat([tensor, tensor], dim=1)[:, : tensor.shape[1]]

        ranks = [rank] * len(d_outs) if chosen is None else [len(part) for part in chosen]
        self.x = strided(normal(tokens, d_in))
        self.outputs = [strided(normal(tokens, size)) for size in d_outs]
        self.grads = [strided(normal(tokens, size)) for size in d_outs]
        self.linears = [(strided(normal(size, d_in, scale=d_in**-0.5)), None) for size in d_outs]
        self.gates = torch.rand(tokens, rank, generator=generator)
        if empty:  # gates of 0, for all tokens and for some
            self.gates[:, : rank // 2] = 0
            self.gates[: tokens // 2] = 0
        columns = None if chosen is None else torch.tensor([column for part in chosen for column in part])
        self.weights = GroupWeights(
            A=normal(sum(ranks), d_in, scale=d_in**-0.5),
            Bt=tuple(normal(r, size, scale=0.3) for r, size in zip(ranks, d_outs, strict=True)),
            columns=columns,
        )
        self.trainable = [min(r, 2 * (i + 1) - 1) for i, r in enumerate(ranks)]

    def to(self, device: str) -> "Case":
        for name in ("x", "gates"):
            setattr(self, name, getattr(self, name).to(device))
        self.outputs = [tensor.to(device) for tensor in self.outputs]
        self.grads = [tensor.to(device) for tensor in self.grads]
        self.linears = [(weight.to(device), None) for weight, _ in self.linears]
        self.weights = GroupWeights(
            A=self.weights.A.to(device),
            Bt=tuple(Bt.to(device) for Bt in self.weights.Bt),
            columns=None if self.weights.columns is None else self.weights.columns.to(device),
        )
        return self


@pytest.fixture(params=SHAPES)
def shape(request: Any) -> str:
    return request.param


@pytest.fixture(params=TOLERANCE, ids=["float32", "bfloat16", "float16"])
def dtype(request: Any) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    return Case


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialized memory with NaN, so that a kernel that leaves part of its output unwritten fails."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: poison(empty(*a, dtype=self.dtype, **k)))


@pytest.fixture(scope="session")
def agrees_with_reference(relative_error: Any) -> Callable[..., None]:
    """`agrees_with_reference(kernels, case)`: compares outputs and all gradients."""

    def check(kernels: Any, case: Case) -> None:
        tolerance = TOLERANCE[case.x.dtype]
        expected = [output.clone() for output in case.outputs]
        low = reference.update_(case.x, expected, case.gates, case.weights, keep=True)

        assert kernels.update_(case.x, case.outputs, case.gates, case.weights) is None
        kept_outputs = [torch.zeros_like(output) for output in case.outputs]
        kept = kernels.update_(case.x, kept_outputs, case.gates, case.weights, keep=True)

        assert low is not None
        assert relative_error(kept, low) <= tolerance
        for found, wanted in zip(case.outputs, expected, strict=True):
            assert relative_error(found, wanted) <= tolerance
        check_outputs(kernels, case, low, tolerance)
        check_gradients(kernels, case, low, tolerance)

    def check_outputs(kernels: Any, case: Case, low: Tensor, tolerance: float) -> None:
        expected, _ = reference.outputs(case.x, case.linears, case.gates, case.weights)
        for keep in (False, True):
            outputs, kept = kernels.outputs(case.x, case.linears, case.gates, case.weights, keep=keep)

            for found, wanted in zip(outputs, expected, strict=True):
                assert found.dtype == case.x.dtype
                assert relative_error(found, wanted) <= tolerance
            assert relative_error(kept, low) <= tolerance if keep else kept is None

    def check_gradients(kernels: Any, case: Case, low: Tensor, tolerance: float) -> None:
        def gradients(implementation: Any) -> Any:
            return implementation.gradients(
                case.grads,
                case.x,
                low,
                case.gates,
                case.weights,
                trainable=case.trainable,
                needs_x_grad=True,
                needs_gates_grad=True,
            )

        found, expected = gradients(kernels), gradients(reference)
        assert found.x.dtype == case.x.dtype
        assert relative_error(found.x, expected.x) <= tolerance
        assert found.gates.dtype == torch.float32
        assert relative_error(found.gates, expected.gates) <= tolerance
        for name in ("A", "Bt"):
            for actual, wanted, new in zip(getattr(found, name), getattr(expected, name), case.trainable, strict=True):
                assert actual.shape[0] == new
                # sums over tokens, which can be all zero where gates are 0
                assert relative_error(actual, wanted, floor=1e-3) <= tolerance

    return check
