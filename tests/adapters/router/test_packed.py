"""Texts of packed rows: where they start and end."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorary.adapters.router.packed import text_ends, text_starts

LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=5)


def positions_of(lengths: list[int], first: int = 0) -> torch.Tensor:
    return torch.cat([torch.arange(first, first + length) for length in lengths])[None]


@given(LENGTHS, st.integers(0, 3))
def test_texts_start_where_their_position_ids_do(lengths: list[int], first: int) -> None:
    starts = text_starts(torch.Size([1, sum(lengths)]), positions_of(lengths, first))

    found = [0] if starts is None else starts[0].nonzero().flatten().tolist()
    assert found == [sum(lengths[:i]) for i in range(len(lengths))]


@given(LENGTHS)
def test_cumulative_lengths_say_the_same(lengths: list[int]) -> None:
    shape, cumulative = torch.Size([1, sum(lengths)]), torch.tensor([0, *lengths]).cumsum(0)

    found, expected = text_starts(shape, None, cumulative), text_starts(shape, positions_of(lengths))

    assert (found is None and expected is None) or torch.equal(found, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("positions", [None, torch.arange(6), torch.arange(3, 9)[None], torch.zeros(3, 1, 6)])
def test_one_text_in_a_row_is_not_packed(positions: torch.Tensor | None) -> None:
    assert text_starts(torch.Size([2, 6]), positions) is None


def test_each_row_has_its_own_texts() -> None:
    starts = text_starts(torch.Size([2, 4]), torch.tensor([[0, 1, 2, 3], [0, 0, 1, 0]]))

    assert starts is not None
    assert starts.tolist() == [[True, False, False, False], [True, True, False, True]]
    assert text_ends(starts).tolist() == [[3, 3, 3, 3], [0, 2, 2, 3]]
