"""Fixed numbers: those of SplitMix64 in Python's integers, whatever the default dtype or the release of a library."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorary.domains.statistics.hashing import (
    HASHED,
    MAX_FEATURES,
    PAIR_BUCKETS,
    feature_projection,
    pair_buckets,
    random_words,
    signed_places,
)

MASK = (1 << 64) - 1


def split_mix(position: int) -> int:
    """The word of SplitMix64 of seed 0 at a position, in integers without bounds."""
    state = (position + 1) * 0x9E3779B97F4A7C15 & MASK
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ state >> 27) * 0x94D049BB133111EB & MASK
    return state ^ state >> 31


def test_the_reference_gives_the_published_words() -> None:
    # the first words of seed 0 of the authors' program
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]

    assert [split_mix(position) for position in range(4)] == expected


@given(start=st.integers(0, 1 << 50), count=st.integers(0, 9))
def test_words_are_those_of_the_reference_from_any_position(start: int, count: int) -> None:
    found = random_words(start, count)

    assert found.dtype == np.uint64
    assert found.tolist() == [split_mix(start + i) for i in range(count)]


# recorded once: another value would make the statistics and the routing of stored packs invalid
def test_the_projection_never_changes() -> None:
    projection = feature_projection(1536)

    assert projection is not None
    assert projection.shape == (MAX_FEATURES, 1536)
    assert projection.dtype == torch.float32
    assert projection.abs().unique().tolist() == [pytest.approx(1536**-0.5)]
    digest = hashlib.sha256(np.packbits(projection.numpy() < 0).tobytes()).hexdigest()
    assert digest == "5865558244b803134e6ff8bd7f7801e6aaafeab5728c3ed73a303882d1abd78b"


def test_its_signs_are_bits_of_the_words_row_by_row() -> None:
    projection = feature_projection(1030)

    assert projection is not None
    found = projection.flatten()
    for place in (0, 1, 63, 64, 1029, 1030, 500_000, MAX_FEATURES * 1030 - 1):
        bit = split_mix((1 << 40) + place // 64) >> place % 64 & 1
        assert found[place] == (-1 if bit else 1) * torch.tensor(1030.0).rsqrt()


@pytest.mark.parametrize("width", [1, 256, MAX_FEATURES])
def test_narrow_hidden_states_are_not_projected(width: int) -> None:
    assert feature_projection(width) is None


def test_hashed_features_never_change() -> None:
    places = signed_places(50_000)

    assert len(places) == 50_000 + PAIR_BUCKETS
    assert 0 <= places.min() <= places.max() < 2 * HASHED
    assert places[:3].tolist() == [split_mix((2 << 40) + i) % (2 * HASHED) for i in range(3)]
    assert places[50_000:50_003].tolist() == [split_mix((3 << 40) + i) % (2 * HASHED) for i in range(3)]
    digest = hashlib.sha256(places.numpy().astype("<i2").tobytes()).hexdigest()
    assert digest == "398627e18aaebde961c88030cd20c2eee6ff08ed6d8e5fc3ff6cea82a277b382"


def test_the_feature_of_a_kind_does_not_depend_on_the_size_of_the_vocabulary() -> None:
    small, large = signed_places(40), signed_places(70)

    assert torch.equal(small[:40], large[:40])
    assert torch.equal(small[40:], large[70:])


def test_the_default_dtype_and_the_seed_change_nothing() -> None:
    expected, places = feature_projection(1100), signed_places(77)
    for function in (feature_projection, signed_places):
        function.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(1)
        found, found_places = feature_projection(1100), signed_places(77)
    finally:
        torch.set_default_dtype(torch.float32)

    assert found is not None
    assert expected is not None
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(found_places, places)


def test_a_pair_has_an_order_and_a_fixed_bucket() -> None:
    before, ids = torch.tensor([0, 1, 5, 151_000]), torch.tensor([0, 5, 1, 151_001])

    found = pair_buckets(before, ids)

    expected = [(31337 * b + 7919 * a) % PAIR_BUCKETS for a, b in zip(before.tolist(), ids.tolist(), strict=True)]
    assert found.tolist() == expected
    assert found[1] != found[2]
