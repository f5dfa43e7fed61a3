"""retrain: what it prints, what it stores, and the exit code of a version that is held back."""

import json

import pytest

from lorary.registry.store.store import Store

SHORT = ["--steps", "2", "--block", "64", "--batch", "2"]


@pytest.fixture
def copy(tmp_path, store):
    """A copy of the registry, which a test may change."""
    import shutil

    return shutil.copytree(store, tmp_path / "copy")


@pytest.fixture
def new_rows(rows, tmp_path):
    """New sentences about law."""
    return str(rows(tmp_path / "new.jsonl", "legal", seed=1))


def test_retrain_prints_plan_progress_and_result(run, copy, new_rows):
    result = run("retrain", "legal", "--data", new_rows, "--tolerance", "0.5", *SHORT, store=copy, tty=True)

    assert result.exit_code == 0, result.stderr
    for words in ("Retraining legal@1 with new.jsonl: 16 rows", "beside those of legal@1", "tolerance 50.0 %"):
        assert words in result.stderr
    assert "training legal" in result.stderr
    for words in ("legal was retrained", "legal@2, extend of legal@1", "latest moves to it", "3 experts of legal@1"):
        assert words in result.stdout
    assert "registry diff legal@1 legal@2" in result.stderr
    assert Store.open(copy).aliases("legal") == {"latest": 2}


def test_retrain_gives_one_json_document(run, copy, new_rows, document):
    options = ["--mode", "continue", "--tolerance", "0.5", *SHORT]

    found = document(run("retrain", "legal", "--data", new_rows, *options, "--json", store=copy))

    assert (found["version"], found["parent"], found["mode"], found["held_back"]) == (2, 1, "continue", False)
    assert found["gate"]["holds"] is True
    assert found["gate"]["parent"] > 0
    assert found["experts_per_layer"] == [1, 2, 2, 3]


def test_options_shape_only_the_new_experts(run, copy, new_rows):
    options = ["--rank", "3", "--experts", "1", "--tolerance", "0.5", *SHORT]

    assert run("retrain", "legal", "--data", new_rows, *options, store=copy).exit_code == 0

    experts = Store.open(copy).manifest("legal").experts
    assert [(expert.rank, expert.generation) for expert in experts] == [(2, 0), (2, 0), (2, 0), (3, 1)]
    assert experts[-1].alpha / 3 == experts[0].alpha / 2


def test_a_version_that_is_worse_is_held_back_with_exit_code_9(run, copy, rows, new_rows, tmp_path):
    other = str(rows(tmp_path / "other.jsonl", "medicine", seed=2))
    long = ["--mode", "continue", "--steps", "40", "--block", "64", "--batch", "2", "--learning-rate", "0.03"]
    assert run("retrain", "legal", "--data", new_rows, *long, store=copy).exit_code == 0
    worse = ["--mode", "fresh", *SHORT, "--learning-rate", "1e-9"]  # learns nothing

    result = run("retrain", "legal", "--data", other, *worse, "--tolerance", "0", store=copy)

    assert result.exit_code == 9, result.stderr
    assert "Error: legal@3 was stored but held back: legal still means legal@2." in result.stderr
    assert "the tolerance is 0.00 %" in result.stderr
    assert "Fix: accept it anyway: registry alias legal@3 latest" in result.stderr
    assert "held back" in run("log", "legal", store=copy).stdout

    assert run("alias", "legal@3", "latest", store=copy).exit_code == 0
    assert json.loads(run("show", "legal", "--json", store=copy).stdout)["version"] == 3


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["legal"], 2, "registry retrain legal --data FILE"),
        (["leagl", "--data", "x.jsonl"], 3, "Did you mean legal?"),
        (["general", "--data", "x.jsonl"], 2, "registry add-domain NAME --data FILE"),
        (["legal", "--data", "none.jsonl"], 3, "There is no file none.jsonl"),
        (["legal", "--data", "x.jsonl", "--mode", "anew"], 2, "anew"),
    ],
)
def test_what_cannot_be_done_is_refused(run, store, words, code, says):
    result = run("retrain", *words, store=store)

    assert result.exit_code == code
    assert says in result.stderr
    assert result.stdout == ""
