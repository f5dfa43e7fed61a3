"""The quickstart's page and its rules; the real run, on the pocket base, is slow."""

import json

import pytest

from lorary.cli.commands import quickstart
from lorary.cli.commands.quickstart import DOMAINS, MARKER, QuickstartResult, quickstart_page
from lorary.cli.report.terminal import heat_table
from lorary.cli.show.page import Page
from lorary.domains.errors import ConflictError


@pytest.fixture(scope="module")
def result(store) -> QuickstartResult:
    from lorary.registry import Registry

    registry = Registry.open(store)
    return QuickstartResult(
        registry=registry,
        manifests=tuple(registry.show(name) for name in ("general", *DOMAINS)),
        plan=registry.plan("medicine+legal"),
        answer=registry.generate(registry.compose("medicine+legal"), "The patient", max_new_tokens=4),
        retention=registry.retention(DOMAINS, questions=False),
        seconds=12.3,
    )


def test_the_page_has_the_retention_matrix(result, tmp_path):
    page = quickstart_page(result, tmp_path)

    assert isinstance(page, Page)
    assert [row[0].plain for row in heat_table(result.retention.bits).rows] == list(result.retention.steps)
    assert any("registry list" in hint for hint in page.hints)
    json.dumps(page.data, allow_nan=False)


def test_the_best_of_a_column_is_coldest(result):
    table = heat_table(result.retention.bits)

    for j, name in enumerate(result.retention.columns, start=1):
        column = [row[j] for row in table.rows]
        best = min(column, key=lambda value: float(value.plain))
        assert best.shown[0].style == "heat0", name


def test_only_an_unfinished_quickstart_is_gone_on_with(tmp_path):
    folder = tmp_path / "qs"
    marker = quickstart._mark_unfinished(folder)
    (folder / "store.json").touch()
    assert quickstart._mark_unfinished(folder) == marker == folder / MARKER

    marker.unlink()

    with pytest.raises(ConflictError):
        quickstart._mark_unfinished(folder)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_real_quickstart(run, tmp_path, document):
    found = document(run("quickstart", str(tmp_path / "qs"), "--json"))

    assert found["pinned"] == "general@1+legal@1+medicine@1"
    assert found["proof"]["unchanged"] is True
    assert found["retention"]["figures"]["forgetting"]["value"] < 0.05
    assert min(found["share_of_oracle_gain"].values()) > 0.5


@pytest.mark.slow
def test_the_fast_quickstart(run, tmp_path, document):
    found = document(run("quickstart", str(tmp_path / "qs"), "--fast", "--json"))

    assert found["pinned"] == "general@1+legal@1+medicine@1"
    assert found["proof"]["unchanged"] is True
