"""Faded sums are those of the recurrence, at any length, in any parts, packed and padded."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorary.domains.statistics.fading import (
    BLOCK,
    HALF_LIFE,
    RESTART,
    TAIL_STEP,
    TAIL_TOKENS,
    faded_sums,
    fading_steps,
    tail_steps,
)

SEED = st.integers(0, 2**31 - 1)
LENGTHS = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 500, BLOCK**2 - 1, BLOCK**2, BLOCK**2 + 1)


def recurrence(increments: Tensor, steps: Tensor, before: Tensor | None = None) -> Tensor:
    """The definition, one position after the other, in float64."""
    sums = torch.zeros_like(increments[:, 0]).double() if before is None else before.double()
    found = []
    for position in range(increments.shape[1]):
        sums = torch.exp2(-steps[:, position, None].double()) * sums + increments[:, position].double()
        found.append(sums)
    return torch.stack(found, 1)


def drawn(seed: int, seq: int, *, width: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Increments, steps of every kind (none, text, ends of sentences, restarts), and sums before."""
    generator = torch.Generator().manual_seed(seed)
    increments = torch.randn(2, seq, width, generator=generator, dtype=dtype)
    kinds = torch.tensor([0.0, 1 / HALF_LIFE, 1 / HALF_LIFE, 0.3, TAIL_STEP, RESTART], dtype=torch.float64)
    often = torch.tensor([0.3, 0.3, 0.3, 0.05, 0.03, 0.02]).expand(2, -1)
    steps = kinds[torch.multinomial(often, seq, replacement=True, generator=generator)]
    return increments, steps, torch.randn(2, width, generator=generator, dtype=dtype)


@pytest.mark.parametrize("seq", LENGTHS)
@pytest.mark.parametrize("continues", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_sums_are_those_of_the_recurrence(seq: int, continues: bool, dtype: torch.dtype, tolerance: float) -> None:
    increments, steps, before = drawn(seq, seq, dtype=dtype)

    found = faded_sums(increments, steps, before if continues else None)

    assert found.dtype == dtype
    expected = recurrence(increments, steps, before if continues else None)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@given(seed=SEED, seq=st.integers(1, 300), step=st.floats(0, 3), data=st.data())
def test_sums_of_any_parts_are_those_of_the_whole(seed: int, seq: int, step: float, data: st.DataObject) -> None:
    increments, steps, before = drawn(seed, seq)
    steps = steps + step * data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(1, max(1, seq - 1)), max_size=4, unique=True)))

    sums, found = before, []
    for part, passed in zip(increments.tensor_split(cuts, 1), steps.tensor_split(cuts, 1), strict=True):
        if part.shape[1]:
            found.append(faded_sums(part, passed, sums))
            sums = found[-1][:, -1]

    torch.testing.assert_close(torch.cat(found, 1), faded_sums(increments, steps, before), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seq", [5, BLOCK, 3 * BLOCK + 7])
def test_sums_that_do_not_fade_are_plain_sums(seq: int) -> None:
    increments, _, before = drawn(0, seq)

    found = faded_sums(increments, torch.zeros(2, seq, dtype=torch.float64), before)

    torch.testing.assert_close(found, before[:, None] + increments.cumsum(1))


@given(lengths=st.lists(st.integers(1, 150), min_size=1, max_size=6), seed=SEED)
def test_texts_of_packed_rows_have_the_sums_of_each_alone(lengths: list[int], seed: int) -> None:
    increments = torch.randn(1, sum(lengths), 3, generator=torch.Generator().manual_seed(seed)) * 1000
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    starts[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    is_text = torch.ones_like(starts)

    found = faded_sums(increments, fading_steps(is_text, 1 / HALF_LIFE, starts=starts))

    alone = [
        faded_sums(text, fading_steps(torch.ones(1, text.shape[1], dtype=torch.bool), 1 / HALF_LIFE))
        for text in increments.split(lengths, dim=1)
    ]
    torch.testing.assert_close(found, torch.cat(alone, 1), rtol=1e-6, atol=1e-2)


def test_nothing_of_a_text_is_left_after_a_restart_however_large() -> None:
    increments = torch.tensor([[[1e30], [1.0], [2.0]]])
    starts = torch.tensor([[True, True, False]])

    found = faded_sums(increments, fading_steps(torch.ones(1, 3, dtype=torch.bool), 0.0, starts=starts))

    assert found.flatten().tolist() == [pytest.approx(1e30), 1.0, 3.0]


@pytest.mark.parametrize("at", [0, 1, 40, 130])
def test_positions_that_are_no_text_change_no_sum_wherever_they_stand(at: int) -> None:
    increments, _, _ = drawn(3, 131)
    padded = torch.cat([increments[:, :at], torch.zeros(2, 70, 3).double(), increments[:, at:]], 1)
    is_text = torch.ones(2, 201, dtype=torch.bool)
    is_text[:, at : at + 70] = False

    found = faded_sums(padded, fading_steps(is_text, 1 / HALF_LIFE))

    expected = faded_sums(increments, fading_steps(torch.ones_like(is_text[:, :131]), 1 / HALF_LIFE))
    torch.testing.assert_close(found[is_text].view(2, 131, 3), expected, rtol=1e-12, atol=1e-12)


def test_evidence_counts_half_after_a_half_life() -> None:
    increments = torch.zeros(1, 65, 1)
    increments[0, 0] = 8.0

    found = faded_sums(increments, fading_steps(torch.ones(1, 65, dtype=torch.bool), 1 / HALF_LIFE))

    assert found[0, [0, 32, 64], 0].tolist() == pytest.approx([8.0, 4.0, 2.0])


def test_gradients_do_not_break_on_steps_without_end() -> None:
    increments, steps, before = drawn(1, 200, dtype=torch.float32)
    increments.requires_grad_()

    faded_sums(increments, steps + RESTART, before).sum().backward()

    assert increments.grad is not None
    assert increments.grad.isfinite().all()


# --- prompts ---


def tail_reference(is_text: list[bool], is_end: list[bool], last: int) -> list[float]:
    found = [0.0] * len(is_text)
    for position in range(len(is_text) - 1):
        follow = sum(is_text[position + 1 : last + 1])
        if is_end[position] and position < last and follow >= TAIL_TOKENS:
            found[position + 1] = TAIL_STEP
    return found


@given(
    rows=st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=24, max_size=24), min_size=1, max_size=3),
    data=st.data(),
)
def test_ends_of_sentences_fade_what_was_before_if_enough_follows(rows: list[Any], data: st.DataObject) -> None:
    is_text = torch.tensor([[text for text, _ in row] for row in rows])
    is_end = torch.tensor([[end for _, end in row] for row in rows])
    last = torch.tensor([[data.draw(st.integers(0, 23))] for _ in rows])

    found = tail_steps(is_text, is_end, last)

    expected = [
        tail_reference(text, end, int(at))
        for text, end, at in zip(is_text.tolist(), is_end.tolist(), last.flatten(), strict=True)
    ]
    assert found.tolist() == expected


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), seed=SEED)
def test_prompts_of_a_packed_row_have_the_steps_of_each_alone(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    is_text, is_end = (torch.rand(1, sum(lengths), generator=generator) < share for share in (0.8, 0.3))
    ends = (torch.tensor(lengths).cumsum(0) - 1).repeat_interleave(torch.tensor(lengths))[None]
    begins = torch.tensor([0, *lengths[:-1]]).cumsum(0)

    found = tail_steps(is_text, is_end, ends)

    for begin, length in zip(begins.tolist(), lengths, strict=True):
        text, end = (part[:, begin : begin + length] for part in (is_text, is_end))
        alone = tail_steps(text, end, torch.tensor([[length - 1]]))
        assert torch.equal(found[:, begin + 1 : begin + length], alone[:, 1:])
        # what comes before it is of another text, and lost at its start whatever is added
        assert found[0, begin] in (0.0, TAIL_STEP)
