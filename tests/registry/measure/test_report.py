"""The figures of a report from constructed cells: matrices, intervals, metrics, routing."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lorary.domains.statistics.intervals import wilson_interval
from lorary.registry.compose.drift import Drift
from lorary.registry.measure.report import RetentionReport, figure_names
from lorary.registry.measure.scores import CellScores

STEPS = ("base", "general", "medicine", "legal")
BITS = {  # by step: general, medicine, legal
    0: (2.0, 4.0, 5.0),
    1: (1.9, 4.0, 5.0),
    2: (1.95, 2.0, 4.5),
    3: (2.1, 2.5, 3.0),
}


def cell(bits: float, *, right: str = "", taken: dict[str, int] | None = None) -> CellScores:
    sizes = (10, 20, 30, 10, 20, 30)
    nats = tuple(bits * math.log(2) * size for size in sizes)
    return CellScores(text_nats=nats, text_bytes=sizes, right=tuple(c == "+" for c in right), taken=taken or {})


def constructed_report(**changes: Any) -> RetentionReport:
    asked = {1: {0: "+---" * 5, 1: "+---" * 5, 2: "+++-" * 5, 3: "++--" * 5}}
    taken = {0: {"general": 3}, 1: {"medicine": 2, "general": 1}, 2: {"legal": 3}}
    cells = {
        (i, j): cell(bits, right=asked.get(j, {}).get(i, ""), taken=taken[j])
        for i, row in BITS.items()
        for j, bits in enumerate(row)
    }
    manifests = [SimpleNamespace(version=1, digest="sha256:0")] * 3
    data = [SimpleNamespace(name=n, texts=(), questions=[], digest="sha256:1") for n in STEPS[1:]]
    scores = SimpleNamespace(
        steps=STEPS,
        columns=STEPS[1:],
        manifests=manifests,
        data=data,
        cells=cells,
        alone=(cell(1.9), cell(1.5, right="++++" * 5), cell(3.0)),
        drift=(Drift(0.0, 0, 0.0, 0), Drift(0.25, 1, 0.5, 1)),
    )
    return RetentionReport(scores, **changes)  # type: ignore[arg-type]


def test_the_matrix_has_the_scores_of_the_cells():
    report = constructed_report()

    np.testing.assert_allclose(report.bits.matrix.R, list(BITS.values()))
    assert report.accuracy is not None
    assert report.accuracy.matrix.R[:, 0].tolist() == [0.25, 0.25, 0.75, 0.5]
    assert report.accuracy.matrix.learned == (2,)


def test_accuracies_have_wilson_intervals():
    report = constructed_report()

    assert report.accuracy is not None
    assert report.accuracy.intervals[2][0] == wilson_interval(15, 20)
    assert report.bits.intervals[0][1] == pytest.approx((4.0, 4.0))  # all texts are alike


@pytest.mark.parametrize(
    ("name", "whole", "domains"),
    [
        ("average_score", 2.75, {"medicine": 2.5, "legal": 3.0}),
        ("backward_transfer", -0.5, {"medicine": -0.5, "legal": None}),
        ("forgetting", 0.5, {"medicine": 0.5, "legal": None}),
        ("forward_transfer", 0.25, {"medicine": 0.0, "legal": 0.5}),
        ("retention", 0.875, {"medicine": 0.75, "legal": 1.0}),
        ("oracle_share", 0.8, {"medicine": 0.6, "legal": 1.0}),
        ("accuracy_retention", 0.5, {"medicine": 0.5}),
        ("general_delta", 0.05, {}),
        ("routing_accuracy", 8 / 9, {"general": 1.0, "medicine": 2 / 3, "legal": 1.0}),
        ("drift_kl", 0.25, {"legal": 0.25}),
        ("drift_flips", 1.0, {"legal": 1.0}),
    ],
)
def test_figures_are_their_formulas(name: str, whole: float, domains: dict):
    figure = constructed_report().figure(name)

    assert figure.whole.value == pytest.approx(whole)
    assert {domain: value.value for domain, value in figure.domains.items()} == {
        domain: value if value is None else pytest.approx(value) for domain, value in domains.items()
    }


def test_figure_names_are_those_of_a_full_report():
    assert {figure.name for figure in constructed_report().figures} == figure_names()


def test_general_text_is_excluded_from_means_over_domains():
    report = constructed_report()

    assert "general" not in report.figure("backward_transfer").domains


def test_the_json_contains_formulas_and_values():
    document = constructed_report(left_out={"finance": "gone"}).as_json()

    json.dumps(document, allow_nan=False)
    figure = document["figures"]["forgetting"]
    assert figure["formula"].startswith("mean over L(j) < T of max")
    assert figure["source"].startswith("Chaudhry et al. 2018")
    assert figure["better"] == "less"
    assert document["matrix"][3] == [2.1, 2.5, 3.0]
    assert document["left_out"] == {"finance": "gone"}
    assert document["routing"]["texts"]["medicine"] == {"medicine": 2, "general": 1}


def test_reading_a_report_does_not_import_torch():
    modules = "lorary.registry.measure.report, lorary.registry.measure.thresholds"
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# --- how a report is shown ---


def test_a_report_shows_its_domains_and_what_it_leaves_out():
    assert repr(constructed_report()) == "RetentionReport(domains=['medicine', 'legal'], cells=12)"
    assert repr(constructed_report(left_out={"finance": "gone"})).endswith(", left_out=['finance'])")


def test_the_html_of_a_report_has_a_row_per_domain():
    page = constructed_report()._repr_html_()

    assert page.count("<tr>") == 1 + 3
    assert "<td>general</td><td>2.000</td><td>1.900</td><td>2.100</td><td></td><td></td><td>worse: +5 % bits" in page
    assert "<td>medicine</td><td>4.000</td><td>2.000</td><td>2.500</td><td>0.750</td><td>0.600</td><td>worse" in page


def test_text_in_a_report_cannot_become_markup():
    report = constructed_report(left_out={"<script>alert(1)</script>": "gone"})
    report.columns = ("general", "<img src=x>", "legal")
    report.steps, report.domains = ("base", *report.columns), report.columns[1:]

    page = report._repr_html_()

    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;img src=x&gt;" in page
