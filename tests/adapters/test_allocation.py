"""Expert counts: the total is exact, every layer with experts has one, deeper layers have no fewer."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorary.adapters.allocation import SCHEDULES, allocate, expert_free_layers, largest_remainder
from lorary.domains.errors import InputError

DEPTHS = st.integers(1, 80)
EXPERTS = st.floats(1, 16, allow_nan=False)
FRACTIONS = st.floats(0, 0.99)


@settings(deadline=None)
@given(layers=DEPTHS, experts=EXPERTS, fraction=FRACTIONS, schedule=st.sampled_from(("linear", "quarters", "uniform")))
def test_total_is_exact_and_every_layer_but_the_free_has_an_expert(
    layers: int, experts: float, fraction: float, schedule: str
) -> None:
    free = expert_free_layers(layers, fraction)

    counts = allocate(layers, experts=experts, schedule=schedule, expert_free=fraction)

    assert len(counts) == layers
    assert counts[:free] == (0,) * free
    assert min(counts[free:]) >= 1
    assert sum(counts) == round(experts * (layers - free))


@settings(deadline=None)
@given(layers=DEPTHS, experts=EXPERTS, fraction=FRACTIONS, schedule=st.sampled_from(("linear", "quarters", "uniform")))
def test_deeper_layers_never_have_fewer_experts(layers: int, experts: float, fraction: float, schedule: str) -> None:
    counts = allocate(layers, experts=experts, schedule=schedule, expert_free=fraction)

    assert list(counts) == sorted(counts)


@settings(deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40), experts=EXPERTS)
def test_layer_weights_give_the_exact_total_and_larger_counts_for_larger_weights(
    weights: list[float], experts: float
) -> None:
    counts = allocate(len(weights), experts=experts, schedule="data", expert_free=0.0, weights=weights)

    assert sum(counts) == round(experts * len(weights))
    assert min(counts) >= 1
    by_weight = [count for _, count in sorted(zip(weights, counts, strict=True))]
    assert by_weight == sorted(by_weight)


@settings(deadline=None)
@given(shares=st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=40), total=st.integers(0, 500))
def test_largest_remainder_has_the_exact_sum_and_is_within_one_of_the_quota(shares: list[float], total: int) -> None:
    counts = largest_remainder(shares, total)

    whole = sum(shares)
    quotas = [share / whole * total if whole else total / len(shares) for share in shares]
    assert sum(counts) == total
    assert all(abs(count - quota) < 1 + 1e-6 for count, quota in zip(counts, quotas, strict=True))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"layers": 8, "experts": 5.0, "schedule": "quarters", "expert_free": 0.0}, (2, 2, 4, 4, 6, 6, 8, 8)),
        ({"layers": 4, "experts": 2.0, "schedule": "uniform", "expert_free": 0.25}, (0, 2, 2, 2)),
        ({"layers": 4, "experts": 2.0, "schedule": "linear", "expert_free": 0.25}, (0, 1, 2, 3)),
        ({"layers": 4, "experts": 1.0, "schedule": "linear", "expert_free": 0.0}, (1, 1, 1, 1)),
        ({"layers": 1, "experts": 3.0, "schedule": "linear", "expert_free": 0.9}, (3,)),
        ({"layers": 4, "experts": 1.5, "schedule": "uniform", "expert_free": 0.0}, (1, 1, 2, 2)),
        (
            {"layers": 3, "experts": 2.0, "schedule": "data", "expert_free": 0.0, "weights": [1.0, 4.0, 1.0]},
            (1, 4, 1),
        ),
    ],
    ids=["molas-quarters", "uniform", "linear", "one-each", "one-layer", "ties-go-deeper", "data"],
)
def test_known_allocations(arguments: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert allocate(**arguments) == expected


@pytest.mark.parametrize(("layers", "fraction", "free"), [(4, 0.25, 1), (32, 0.25, 8), (1, 0.9, 0), (2, 0.99, 1)])
def test_at_least_one_layer_has_experts(layers: int, fraction: float, free: int) -> None:
    assert expert_free_layers(layers, fraction) == free


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"schedule": "quadratic"}, "quadratic"),
        ({"experts": 0.5}, "0.5"),
        ({"expert_free": 1.0}, "1.0"),
        ({"experts": 1e9}, "1,024"),
        ({"experts": float("nan")}, "nan"),
        ({"expert_free": -0.1}, "-0.1"),
        ({"schedule": "data"}, "none"),
        ({"schedule": "data", "weights": [1.0]}, "3 positive weights"),
        ({"schedule": "data", "weights": [1.0, 0.0, 1.0]}, "positive"),
        ({"schedule": "data", "weights": [1.0, float("inf"), 1.0]}, "inf"),
        ({"schedule": "data", "weights": [1.0, float("nan"), 1.0]}, "nan"),
        ({"weights": [1.0, 1.0, 1.0]}, "'linear'"),
    ],
)
def test_invalid_arguments_are_refused_and_named(changes: dict[str, Any], named: str) -> None:
    arguments = {"layers": 4, "experts": 2.0, "schedule": "linear", "expert_free": 0.25} | changes

    with pytest.raises(InputError) as refusal:
        allocate(**arguments)

    assert named in str(refusal.value)


def test_every_schedule_is_accepted() -> None:
    for schedule in SCHEDULES:
        weights = [1.0, 2.0] if schedule == "data" else None
        assert sum(allocate(2, experts=2.0, schedule=schedule, expert_free=0.0, weights=weights)) == 4
