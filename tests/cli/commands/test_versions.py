"""log, alias, remove, restore: versions that come, go and are named."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from lorary.registry.store.store import Store


@pytest.fixture
def versions(bare: Path, store: Path) -> Path:
    """A registry with three versions of medicine: the second from the first, the third held back."""
    from dataclasses import replace

    original, copy = Store.open(store), Store.open(bare)
    first = original.manifest("medicine")
    files = {file.path: (original.read(first, file.path), file.kind) for file in first.files}
    copy.commit(replace(first, created="2026-01-01T00:00:00+00:00"), files)
    parent = {"parent": {"version": 1, "digest": first.digest}, "mode": "extend"}
    copy.commit(replace(first, lineage=parent, created="2026-01-02T00:00:00+00:00"), files)
    gate = {"gate": {"holds": False, "parent": 2.0, "new": 2.5, "tolerance": 0.005}}
    worse = first.evaluation | gate
    held = replace(first, lineage=parent | {"mode": "fresh"}, evaluation=worse, created="2026-01-03T00:00:00+00:00")
    copy.commit(held, files, alias=None)
    return bare


def test_log_tells_who_came_from_whom_newest_first(run, versions, values, document):
    header, *rows = values(run("log", "medicine", store=versions))

    assert header == ["VERSION", "ALIASES", "FROM", "MODE", "STATE", "BITS/BYTE", "CREATED"]
    assert [row[:5] for row in rows] == [
        ["medicine@3", "", "medicine@1", "fresh", "held back"],
        ["medicine@2", "latest", "medicine@1", "extend", ""],
        ["medicine@1", "", "", "", ""],
    ]
    found = document(run("log", "medicine", "--json", store=versions))["versions"]
    assert [(v["version"], v["held_back"], v["removed"]) for v in found] == [
        (3, True, None),
        (2, False, None),
        (1, False, None),
    ]
    assert found[0]["gate"]["new"] == 2.5


def test_log_of_everything_has_every_domain_also_removed_ones(run, versions):
    for _ in range(3):
        assert run("remove", "medicine", "-y", store=versions).exit_code == 0

    result = run("log", store=versions, tty=True)

    assert "general@1" in result.stdout
    assert result.stdout.count("removed") == 3
    assert run("log", "leagl", store=versions).exit_code == 3


def test_alias_names_moves_lists_and_takes_away(run, versions, values, document):
    found = document(run("alias", "medicine@1", "production", "--json", store=versions))
    assert found["aliases"] == {"latest": 2, "production": 1}

    run("alias", "medicine@latest", "production", store=versions)
    assert values(run("alias", "medicine", store=versions)) == [
        ["ALIAS", "VERSION"], ["latest", "medicine@2"], ["production", "medicine@2"]
    ]  # fmt: skip

    run("alias", "medicine", "production", "--remove", store=versions)
    assert document(run("alias", "medicine", "--json", store=versions))["aliases"] == {"latest": 2}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["alias", "medicine@9", "production"], 3, "Known versions: 1, 2, 3"),
        (["alias", "medicine", "7"], 2, "A number is always read as a version"),
        (["alias", "medicine", "--remove"], 2, "registry alias medicine ALIAS --remove"),
        (["alias", "medicine", "latest", "--remove"], 2, "registry alias medicine@VERSION latest"),
        (["alias", "medicine", "none-such", "--remove"], 3, "none-such"),
        (["remove", "medicine@1"], 2, "registry remove medicine@1 -y"),
        (["remove", "general", "-y"], 4, "KP"),
        (["restore", "medicine"], 3, "registry log medicine"),
        (["restore", "medicine@1"], 4, "not removed"),
        (["restore", "medicine@production"], 2, "NUMBER"),
    ],
)
def test_what_cannot_be_done_says_what_can(run, versions, words, code, says):
    result = run(*words, store=versions)

    assert result.exit_code == code, result.stderr
    assert says in result.stderr
    assert Store.open(versions).versions("medicine") == [1, 2, 3]


def test_remove_moves_latest_past_what_was_held_back_and_restore_brings_back(run, versions, document):
    found = document(run("remove", "medicine", "-y", "--json", store=versions))
    assert (found["version"], found["versions"], found["latest"]) == (2, [1, 3], 1)

    result = run("compose", "medicine@2", store=versions)
    assert result.exit_code == 3
    assert "registry restore medicine@2" in result.stderr

    found = document(run("restore", "medicine", "--json", store=versions))
    assert (found["version"], found["versions"], found["latest"]) == (2, [1, 2, 3], 1)


def test_remove_is_refused_where_an_alias_means_the_version(run, versions):
    run("alias", "medicine@1", "production", store=versions)

    result = run("remove", "medicine@1", "-y", store=versions)

    assert result.exit_code == 4
    assert "registry alias medicine production --remove" in result.stderr


@pytest.mark.parametrize(("answer", "left"), [("y\n", [2, 3]), ("n\n", [1, 2, 3]), ("\n", [1, 2, 3])])
def test_remove_asks_on_a_terminal(versions, answer, left):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lorary.cli", "remove", "medicine@1", "--store", str(versions)]
    process = subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    os.write(ours, answer.encode())
    _, asked = process.communicate(timeout=60)
    os.close(ours)

    assert "Remove medicine@1" in asked
    assert process.returncode == (0 if left == [2, 3] else 1)
    assert Store.open(versions).versions("medicine") == left


def test_show_tells_the_lineage(run, versions):
    assert "extend, from medicine@1" in run("show", "medicine", store=versions, tty=True).stdout
    found = json.loads(run("show", "medicine@1", "--json", store=versions).stdout)
    assert found["versions"] == [1, 2, 3]
