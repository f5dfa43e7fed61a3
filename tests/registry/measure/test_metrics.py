"""The metrics of a retention matrix: worked examples, both directions, draws, and undefined values."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lorary.registry.measure.metrics import METRICS, RetentionMatrix, mean

STEPS = ("base", "medicine", "legal", "code")
LOSSES = [[4.0, 5.0, 6.0], [2.0, 4.5, 6.5], [2.5, 3.0, 5.5], [3.0, 2.5, 3.0]]


def matrix(R=LOSSES, **changes) -> RetentionMatrix:
    given = {"steps": STEPS, "domains": STEPS[1:], "R": R, "lower_is_better": True, "oracle": [2.0, 2.0, 6.5]}
    return RetentionMatrix(**(given | changes))


def of_domains(name: str, found: RetentionMatrix) -> list[float | None]:
    return [None if math.isnan(v) else round(v, 6) for v in METRICS[name].compute(found).tolist()]


@pytest.mark.parametrize(
    ("name", "expected", "whole"),
    [
        ("average_score", [3.0, 2.5, 3.0], 17 / 6),
        ("backward_transfer", [-1.0, 0.5, None], -0.25),
        ("forgetting", [1.0, -0.5, None], 0.25),
        ("forward_transfer", [None, 0.5, 0.5], 0.5),
        ("retention", [0.5, 1.25, 1.0], 2.75 / 3),
        ("oracle_share", [0.5, 2.5 / 3, None], (0.5 + 2.5 / 3) / 2),
    ],
)
def test_each_metric_is_its_formula(name: str, expected: list, whole: float):
    assert of_domains(name, matrix()) == [None if v is None else round(v, 6) for v in expected]
    assert mean(METRICS[name].compute(matrix())) == pytest.approx(whole)


@pytest.mark.parametrize("name", [name for name in METRICS if name != "average_score"])
@given(R=arrays(float, (4, 3), elements=st.floats(0.1, 9)))
def test_negated_scores_give_the_same_metrics(name: str, R: np.ndarray):
    losses, accuracies = matrix(R), matrix(-R, lower_is_better=False, oracle=[-2.0, -2.0, -6.5])

    assert of_domains(name, losses) == of_domains(name, accuracies)


@pytest.mark.parametrize("name", METRICS)
def test_leading_axes_are_kept(name: str):
    noisy = np.asarray(LOSSES) + np.random.default_rng(0).normal(0, 0.1, (7, 4, 3))
    oracle = np.tile([2.0, 2.0, 5.0], (7, 1))

    found = METRICS[name].compute(matrix(noisy, oracle=oracle))

    assert found.shape == (7, 3)
    for draw in range(7):
        one = METRICS[name].compute(matrix(noisy[draw], oracle=oracle[draw]))
        assert np.array_equal(found[draw], one, equal_nan=True)


def test_missing_cells_are_skipped():
    R = np.array(LOSSES)
    R[1, 2] = R[1, 1] = np.nan

    assert of_domains("forgetting", matrix(R)) == [1.0, -0.5, None]
    assert of_domains("forward_transfer", matrix(R)) == [None, None, 0.5]
    assert np.isnan(mean([np.nan, np.nan]))


def test_retention_is_undefined_without_a_gain():
    R = np.array(LOSSES)
    R[1, 0] = 4.0

    assert of_domains("retention", matrix(R))[0] is None


def test_a_single_step_has_no_forgetting():
    found = RetentionMatrix(steps=STEPS[:2], domains=STEPS[1:2], R=[[4.0], [2.0]], lower_is_better=True)

    assert {name: of_domains(name, found) for name in METRICS} == {
        "average_score": [2.0],
        "backward_transfer": [None],
        "forgetting": [None],
        "forward_transfer": [None],
        "retention": [1.0],
        "oracle_share": [None],
    }


def test_columns_are_selected_by_name():
    found = matrix().of(["code", "medicine"])

    assert found.R.tolist() == [[6.0, 4.0], [6.5, 2.0], [5.5, 2.5], [3.0, 3.0]]
    assert found.learned == (3, 1)
    assert of_domains("retention", found) == [1.0, 0.5]


def test_a_matrix_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="4 steps and 2 domains"):
        matrix(domains=("medicine", "legal"))


def test_every_metric_has_a_formula_a_source_and_a_meaning():
    for metric in METRICS.values():
        assert metric.formula
        assert metric.source
        assert metric.meaning


def test_metrics_do_not_import_torch():
    modules = "lorary.registry.measure.metrics, lorary.domains.statistics.intervals"
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
