"""The gates of every implementation against the reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lorary.adapters.kernels import eager, reference
from lorary.adapters.layer.gates import LayerGates

# ranks of the experts by softmax group; groups 0 and 1 belong to slot 0
LAYOUTS = {
    "one-expert": [[4]],
    "one-of-each": [[2], [2], [2]],
    "mixed": [[3, 1], [2], [1, 5, 2], [4]],
    "many": [[8, 8, 8], [8, 8]] * 5,
}
WIDTHS = {1: 24, 63: 33, 300: 256}  # by number of tokens
TOLERANCE = 2e-5  # also for 16 bits: inputs are exact, the rest is computed to float32 accuracy
IMPLEMENTATIONS = ["eager", "triton"]


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: Any) -> Any:
    if request.param == "eager":
        return eager
    pytest.importorskip("triton")
    return pytest.importorskip("lorary.adapters.kernels.triton_group")


@pytest.fixture
def make_gates(random_gates: Callable[..., LayerGates]) -> Callable[..., LayerGates]:
    def make(layout: str, width: int) -> LayerGates:
        groups = LAYOUTS[layout]
        return random_gates(groups, width=width, slots=[max(0, group - 1) for group in range(len(groups))])

    return make


def inputs(tokens: int, slots: int, *, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = (torch.randn(tokens, WIDTHS[tokens], generator=generator) * scale).to(dtype)
    return hidden, torch.softmax(torch.randn(tokens, slots, generator=generator), -1)


def assert_matches_reference(kernels: Any, gates: LayerGates, hidden: Tensor, slot_gate: Tensor) -> Tensor:
    tables = gates.tables()
    with torch.no_grad():
        found = kernels.gates(hidden, slot_gate, tables)
        expected = reference.gates(hidden, slot_gate, tables)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    return found


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tokens", WIDTHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["32", "16", "b16"])
def test_gates_match_the_reference(kernels: Any, layout: str, tokens: int, dtype: torch.dtype, make_gates: Any) -> None:
    gates = make_gates(layout, WIDTHS[tokens])
    hidden, slot_gate = inputs(tokens, max(1, len(LAYOUTS[layout]) - 1), dtype=dtype)

    assert_matches_reference(kernels, gates, hidden, slot_gate)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e4])
def test_gates_are_finite_for_any_norm_of_the_hidden_state(kernels: Any, scale: float, make_gates: Any) -> None:
    hidden, slot_gate = inputs(63, 3, scale=scale)

    found = assert_matches_reference(kernels, make_gates("mixed", 33), hidden, slot_gate)

    assert found.isfinite().all()


@pytest.mark.usefixtures("poisoned")
def test_strided_hidden_states_and_broadcast_slot_gates_are_accepted(kernels: Any, make_gates: Any) -> None:
    gates = make_gates("mixed", 33)
    hidden, slot_gate = inputs(63, 3)

    assert_matches_reference(kernels, gates, torch.cat([hidden, hidden], 1)[:, :33], slot_gate[:1].expand(63, -1))
    assert_matches_reference(kernels, gates, hidden.t().contiguous().t(), slot_gate.t().contiguous().t())
    assert_matches_reference(kernels, gates, hidden.view(9, 7, 33), slot_gate[:1].expand(9, 1, -1))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("slots", [(0,), (1,), (0, 2), (1, 2), ()])
def test_gates_of_selected_slots_are_unchanged(kernels: Any, slots: tuple[int, ...], make_gates: Any) -> None:
    gates = make_gates("mixed", 33)
    hidden, slot_gate = inputs(63, 3)
    tables = gates.tables()

    found = kernels.gates(hidden, slot_gate, tables.select_slots([(slot, slot + 1) for slot in slots] or [(0, 0)]))

    expected = reference.gates(hidden, slot_gate, tables)[:, torch.isin(tables.slot_of_rank, torch.tensor(slots))]
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_no_tokens_give_empty_gates(kernels: Any, make_gates: Any) -> None:
    gates = make_gates("mixed", 33)

    assert kernels.gates(torch.zeros(0, 33), torch.zeros(0, 3), gates.tables()).shape == (0, 18)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_split_k_does_not_change_the_gates(parts: int, make_gates: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    triton_gates = pytest.importorskip("lorary.adapters.kernels.triton_gates")
    monkeypatch.setattr(triton_gates, "choose_split_k", lambda *_: parts)
    hidden, slot_gate = inputs(300, 3)

    assert_matches_reference(triton_gates, make_gates("mixed", 256), hidden, slot_gate)
