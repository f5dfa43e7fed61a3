"""list, show, version: a table for people, tab-separated values in a pipe, one JSON document with --json."""

import json
from dataclasses import replace

import pytest

from lorary.cli.show.facts import drift
from lorary.registry.store.store import Store


def test_list_draws_a_table_on_a_terminal(run, store):
    result = run("list", store=store, tty=True)

    assert result.exit_code == 0
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["NAME", "VERSION", "ROLE", "EXPERTS", "PARAMETERS", "BITS/BYTE", "GAIN", "CREATED"]
    assert [line.split()[0] for line in lines] == ["general", "legal", "medicine"]


def test_list_prints_exact_values_in_a_pipe(run, store, values):
    header, general, *_ = values(run("list", store=store))

    assert header[:3] == ["NAME", "VERSION", "ROLE"]
    assert general[:3] == ["general", "1", "preservation"]
    assert general[4].isdigit()
    assert general[-1].endswith("+00:00")


def test_list_gives_one_json_document(run, store, document):
    found = document(run("list", "--json", store=store))

    assert found["command"] == "list"
    assert [domain["name"] for domain in found["domains"]] == ["general", "legal", "medicine"]
    assert found["domains"][0]["digest"].startswith("sha256:")


def test_list_suggests_the_next_step_while_there_is_only_the_kp_bank(run, bare):
    result = run("list", store=bare)

    assert "registry add-domain medicine" in result.stderr


def test_show_tells_everything(run, store):
    result = run("show", "medicine", store=store, tty=True)

    assert result.exit_code == 0
    for word in (
        "medicine@1, latest",
        "per layer",
        "loss",
        "frozen",
        "tensors and every stored version unchanged",
        "ORACLE GAIN",
    ):
        assert word in result.stdout


def test_show_in_a_pipe_cuts_nothing_off(run, store, values, document):
    digest = document(run("show", "medicine@1", "--json", store=store))["digest"]

    facts = {line[0]: line[1] for line in values(run("show", "medicine@latest", store=store)) if len(line) == 2}

    assert facts["digest"] == digest
    assert "sha256:" in facts["frozen"]
    assert len(facts["frozen"].split("sha256:")[1].split(",")[0]) == 64


def test_show_files_lists_what_the_manifest_names(run, store, values, document):
    lines = values(run("show", "legal", "--files", store=store))
    found = document(run("show", "legal", "--files", "--json", store=store))

    assert lines[0] == ["PATH", "KIND", "SIZE", "DIGEST"]
    assert [line[0] for line in lines[1:]] == [file["path"] for file in found["files"]]


def test_show_manifest_prints_the_manifest_itself(run, store):
    result = run("show", "legal", "--manifest", store=store)

    assert json.loads(result.stdout)["name"] == "legal"


@pytest.mark.parametrize(
    ("share", "says"), [(0.05, "at most 5.0 %, none"), (0.2, "at most 20.0 %, more than 5 %, none")]
)
def test_a_newcomer_that_takes_much_of_an_older_domain_is_pointed_out(share, says, store):
    manifest = Store.open(store).manifest("legal")
    found = {"domains": 1, "mean_kl": 0.0, "top1_flips": 0, "newcomer_share": share}

    told = drift(replace(manifest, proof={"drift": found}))

    assert told is not None
    assert says in told.plain


def test_version_names_the_libraries(run, document):
    versions = document(run("version", "--json"))["versions"]

    assert versions["lorary"] == "0.1.0"
    assert versions["torch"][0].isdigit()
    assert "transformers" in run("version", tty=True).stdout


def test_no_colour_when_asked_and_colour_when_forced(run, store):
    plain = run("show", "medicine", store=store, tty=True)
    coloured = run("show", "medicine", store=store, tty=True, env={"NO_COLOR": "", "TERM": "xterm-256color"})

    assert "\x1b[3" not in plain.stdout
    assert "\x1b[3" in coloured.stdout
