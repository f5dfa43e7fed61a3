"""`registry report`: tables, one JSON document, CSV, a page, and exit 9 when a gate fails."""

import csv
import json

import pytest

from lorary.registry import Registry


@pytest.fixture(scope="module")
def reported(run, store, document):
    return document(run("report", "--json", store=store))


def test_the_document_has_matrix_intervals_and_figures(reported):
    assert reported["steps"] == ["base", "general", "medicine", "legal"]
    assert [len(row) for row in reported["matrix"]] == [3, 3, 3, 3]
    low, high = reported["intervals"][3][1]
    assert low <= reported["matrix"][3][1] <= high
    assert reported["figures"]["retention"]["formula"]
    assert reported["accuracy"] is None, "own text under a built-in name has no questions of the built-in domain"
    assert reported["gates"] == []


def test_people_get_heat_maps_and_formulas(run, store, reported):
    shown = run("report", store=store, tty=True, env={"COLUMNS": "200"}).stdout

    for words in ("Retention", "+ medicine", "Verdict", "Routing", "Chaudhry et al. 2018"):
        assert words in shown


def test_no_number_is_cut_off_on_a_narrow_terminal(run, store, reported):
    shown = run("report", store=store, tty=True, env={"COLUMNS": "80"}).stdout

    tables = shown[: shown.index("Figures")]
    assert "…" not in tables


def test_a_pipe_gets_exact_numbers(run, store, reported, values):
    lines = values(run("report", store=store))

    lines = lines[lines.index(["STEP", "general", "medicine", "legal"]) :]
    assert float(lines[1][2]) == pytest.approx(reported["matrix"][0][1], abs=1e-5)


def test_a_gate_that_fails_ends_with_9_after_the_report(run, store, reported):
    result = run("report", "--gate", "retention>=-100", "--gate", "average_score<0.001", "--json", store=store)

    assert result.exit_code == 9
    gates = json.loads(result.stdout)["gates"]
    assert gates[0]["failed"].keys() <= {"medicine", "legal"}
    assert set(gates[1]["failed"]) == {"medicine", "legal"}
    assert "average_score of medicine is" in json.loads(result.stderr.splitlines()[-1])["error"]["cause"]


def test_a_gate_that_holds_is_shown(run, store, reported):
    result = run("report", "--gate", "general_delta<=100", store=store, tty=True)

    assert result.exit_code == 0
    assert "general_delta<=100" in result.stdout
    assert "holds" in result.stdout


def test_a_bad_gate_is_refused_before_anything_is_measured(run, store):
    result = run("report", "--gate", "retention=1", store=store)

    assert result.exit_code == 2
    assert result.stdout == ""


def test_domains_and_questions_can_be_chosen(run, store, document):
    found = document(run("report", "--domains", "legal", "--no-questions", "--json", store=store))

    assert found["steps"] == ["base", "general", "legal"]
    assert found["accuracy"] is None


def test_every_cell_is_a_line_of_csv(run, store, reported, tmp_path):
    run("report", "--csv", "cells.csv", store=store)

    rows = list(csv.DictReader((tmp_path / "cells.csv").open()))
    assert len(rows) == 4 * 3
    found = next(row for row in rows if (row["step"], row["domain"], row["metric"]) == ("3", "legal", "bits_per_byte"))
    assert float(found["value"]) == pytest.approx(reported["matrix"][3][2], abs=1e-5)


def test_a_page_can_be_written_beside_the_report(run, store, reported, tmp_path):
    result = run("report", "--html", "page.html", "--gate", "average_score<0.001", store=store)

    assert result.exit_code == 9, "the page is there although the gate failed"
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Retention after 2 domains" in page
    assert "1 of 1 threshold failed" in page
    assert f"{reported['matrix'][3][2]:.3f}</td>" in page
    manifest = Registry.open(store).show("legal")
    assert manifest.digest in page


@pytest.mark.parametrize("option", ["--html", "--svg", "--csv"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(run, store, tmp_path, option):
    for path, words in ((tmp_path / "none" / "r.png", "There is no folder"), (tmp_path, "is a folder")):
        result = run("report", option, str(path), store=store)

        assert result.exit_code == 2
        assert words in result.stderr
        assert "reading held-out text" not in result.stderr


def test_github_gets_markdown_and_the_exit_code(run, store, reported):
    result = run("report", "--format", "github", "--gate", "average_score<0.001", store=store)

    assert result.exit_code == 9
    assert result.stdout.startswith("### Retention after 2 domains: ")
    assert "| `average_score<0.001` | :red_circle: fails |" in result.stdout
    refused = run("report", "--format", "github", "--json", store=store)
    assert (refused.exit_code, refused.stdout) == (2, "")
