"""Closed slots are skipped: exactly what is defined is left out, whatever the batch, the padding and the cut."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from lorary.adapters.layer.active import MIN_TOKENS, SLOT_THRESHOLD, Part, close_small_gates, plan_parts
from lorary.adapters.layer.attach import attach
from lorary.adapters.layer.stack import Stack
from lorary.adapters.router.router import DomainRouter, Temperatures
from lorary.domains.statistics.statistics import DomainStatistics

NAMES = ("general", "a", "b", "c", "d")


def gates(*rows: list[str]) -> Tensor:
    """Slot gates (batch, seq, slots) from strings of 0 and 1."""
    return torch.tensor([[[float(letter) for letter in position] for position in row] for row in rows])


def test_gates_below_the_threshold_are_zero_and_the_others_as_they_were() -> None:
    found = close_small_gates(torch.tensor([[[0.9, 0.0999, 0.9e-4, 1.1e-4]]]), SLOT_THRESHOLD)

    assert torch.equal(found, torch.tensor([[[0.9, 0.0999, 0.0, 1.1e-4]]]))
    assert torch.equal(close_small_gates(torch.tensor([[[1e-9]]]), 0.0), torch.tensor([[[1e-9]]]))


def test_a_few_positions_take_the_slots_that_any_of_them_needs() -> None:
    assert plan_parts(gates(["1000"], ["0011"])) == [Part(0, 2, ((0, 1), (2, 4)))]
    assert plan_parts(gates(["110"], ["001"])) == [Part(0, 2, None)]
    assert plan_parts(gates(["000"], ["000"])) == [Part(0, 2, ((0, 0),))]


def test_a_text_has_a_head_that_is_undecided_and_a_tail_that_is_not() -> None:
    assert plan_parts(gates(["1111"] * 10 + ["1010"] * 90)) == [Part(0, 10, None), Part(10, 100, ((0, 1), (2, 3)))]


def test_each_row_of_a_batch_is_planned_by_itself() -> None:
    found = plan_parts(gates(["11000"] * 40, ["10100"] * 40, ["10100"] * 40))

    assert found == [Part(0, 40, ((0, 2),)), Part(40, 120, ((0, 1), (2, 3)))]


def test_a_slot_that_opens_late_keeps_its_row_whole() -> None:
    assert plan_parts(gates(["10"] * 50 + ["11"] * 50)) == [Part(0, 100, None)]


def open_slots(part: Part, slots: int) -> set[int]:
    runs = ((0, slots),) if part.runs is None else part.runs
    return {slot for start, stop in runs for slot in range(start, stop)}


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 4), seq=st.integers(1, 80), slots=st.integers(1, 6))
def test_parts_cover_every_position_once_and_every_open_slot(seed: int, batch: int, seq: int, slots: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, seq + 1, (batch, slots), generator=generator)
    slot_gate = (torch.arange(seq)[None, :, None] < ends[:, None, :]).float()

    parts = plan_parts(slot_gate)

    flat = slot_gate.reshape(-1, slots)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == batch * seq
    for part in parts:
        closed = set(range(slots)) - open_slots(part, slots)
        assert flat[part.start : part.stop, list(closed)].sum() == 0


# --- in a model ---


@pytest.fixture(scope="module")
def decided(random_stack: Any, random_statistics: Any) -> Any:
    """`decided(base, threshold=..)`: five domains, each with its own tokens, so that most slots close soon."""

    def make(base: Any, *, threshold: float = SLOT_THRESHOLD, static: bool = False) -> Any:
        stack: Stack = random_stack(base, names=NAMES, static=static)
        if static:
            return attach(base, stack, router=None, fixed=torch.tensor([0.5, 0.0, 0.5, 0.0, 0.0]), threshold=threshold)
        statistics: list[DomainStatistics] = [
            random_statistics(
                seed=slot, tokens=range(3, 64) if slot == 0 else range(3 + 12 * (slot - 1), 3 + 12 * slot)
            )
            for slot in range(5)
        ]
        router = DomainRouter(statistics, prior=torch.ones(5), temperatures=Temperatures(token=1.0), width=32)
        return attach(base, stack, router=router, threshold=threshold)

    return make


def text_of(domain: int, length: int) -> Tensor:
    start = 3 + 12 * (domain - 1)
    return torch.randint(start, start + 12, (1, length), generator=torch.Generator().manual_seed(domain))


@pytest.fixture
def slots_in_use(layer_gates: Any) -> Callable[..., list[Any]]:
    """`slots_in_use(composed, **inputs)`: the ranges of slots that a forward computes in the last layer."""
    return lambda composed, **inputs: [part.slots for part in list(layer_gates(composed, **inputs).values())[-1]]


@pytest.mark.parametrize("length", [1, 5, MIN_TOKENS, 90])
def test_logits_differ_from_those_of_all_slots_by_the_threshold(
    any_base: Any, decided: Any, logits: Any, length: int, relative_error: Any, slots_in_use: Any
) -> None:
    ids = torch.cat([text_of(domain, length) for domain in (1, 3)])
    composed = decided(any_base)

    found = logits(composed, input_ids=ids)

    assert relative_error(found, logits(decided(any_base, threshold=0.0), input_ids=ids)) < 1e-2
    if length >= MIN_TOKENS:
        assert any(slots is not None for slots in slots_in_use(composed, input_ids=ids))


@pytest.mark.parametrize("length", [1, 5, 90])
def test_leaving_closed_slots_out_changes_nothing_but_the_time(
    any_base: Any, decided: Any, logits: Any, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.cat([text_of(domain, length) for domain in (1, 3, 4)])
    composed = decided(any_base)
    found = logits(composed, input_ids=ids)

    monkeypatch.setattr(
        "lorary.adapters.layer.routing.plan_parts", lambda gate: [Part(0, gate.shape[0] * gate.shape[1], None)]
    )

    torch.testing.assert_close(found, logits(composed, input_ids=ids), rtol=1e-5, atol=1e-5)


def test_a_row_is_the_same_alone_and_among_rows_of_other_domains(base: Any, decided: Any, logits: Any) -> None:
    composed = decided(base)
    rows = [text_of(domain, 60) for domain in (1, 2, 3, 4)]

    together = logits(composed, input_ids=torch.cat(rows))

    for row, ids in enumerate(rows):
        torch.testing.assert_close(together[row], logits(composed, input_ids=ids)[0], rtol=1e-4, atol=1e-4)


def test_decoding_after_a_decided_text_runs_on_the_open_slots(
    base: Any, decided: Any, generated: Any, slots_in_use: Any
) -> None:
    composed, cache = decided(base), DynamicCache(config=base.config)

    found = generated(composed, input_ids=text_of(2, 60), past_key_values=cache)

    slots = slots_in_use(composed, input_ids=found[:, -1:], past_key_values=cache)
    assert sum(stop - start for start, stop in slots) < 5
    assert torch.equal(found, generated(composed, input_ids=text_of(2, 60), use_cache=False))


def test_slots_of_weight_zero_are_left_out_of_a_static_composition(
    base: Any, decided: Any, logits: Any, slots_in_use: Any
) -> None:
    composed = decided(base, static=True)

    found = logits(composed, input_ids=text_of(1, 9))

    assert slots_in_use(composed, input_ids=text_of(1, 9)) == [(0, 1), (2, 3)]
    expected = logits(decided(base, static=True, threshold=0.0), input_ids=text_of(1, 9))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_threshold_of_zero_leaves_nothing_out(base: Any, decided: Any, slots_in_use: Any) -> None:
    composed = decided(base, threshold=0.0)

    assert slots_in_use(composed, input_ids=text_of(1, 60)) == [None]


def test_what_was_derived_from_weights_goes_when_the_model_is_moved(base: Any, decided: Any, logits: Any) -> None:
    composed = decided(base)
    expected = logits(composed, input_ids=text_of(1, 60))
    group = composed.model.layers[-1].expert_groups[0]
    assert group._bases

    composed.to("cpu")

    assert not group._bases
    assert torch.equal(logits(composed, input_ids=text_of(1, 60)), expected)
