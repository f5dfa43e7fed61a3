"""Every failure: its exit code, its three lines, and that nothing is stored."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from lorary.cli.errors import INTERRUPTED
from lorary.registry.store.seals import write_sealed

SHORT = ["--steps", "1", "--block", "64", "--batch", "2"]


def check(result, code, *words):
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("words", [["show", "leagl"], ["compose", "leagl"], ["show", "legal@7"]])
def test_an_unknown_domain_or_version(run, store, words):
    check(run(*words, store=store), 3, "Cause: Known", "Fix: ")


def test_an_unknown_domain_without_data_names_the_built_in_ones(run, bare):
    check(run("add-domain", "medecine", store=bare), 3, "did you mean 'medicine'?", "--data FILE")


def test_a_missing_store(run, tmp_path):
    check(run("list", "--store", str(tmp_path / "none")), 3, "There is no store", f"init --store {tmp_path / 'none'}")


def test_a_name_that_is_taken(run, store, built):
    data = str(built["data"] / "legal.jsonl")

    check(run("add-domain", "legal", "--data", data, store=store), 4, "'legal'", "versions: 1")


def test_a_registry_that_is_there_already(run, store, base_folder):
    check(run("init", "--base", str(base_folder), store=store), 4, "is taken")
    check(run("quickstart", str(store)), 4, "already", "registry quickstart other-folder")


@pytest.mark.parametrize("name", ["Legal", "a b", "latest", "general", "../x"])
def test_a_bad_name(run, bare, name):
    check(run("add-domain", name, "--data", "x.jsonl", store=bare), 2, "Fix: ")


def test_bad_rows_are_named_by_file_and_line(run, bare, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"text": "one"}\n{"text": \n{"txt": "three"}\n')

    check(
        run("add-domain", "contracts", "--data", str(data), store=bare), 2, f"{data}:2: bad JSON", "2 rows are invalid"
    )
    assert not (bare / "domains" / "contracts").exists()


def test_an_empty_file(run, bare, tmp_path):
    (tmp_path / "empty.jsonl").touch()

    check(run("add-domain", "contracts", "--data", "empty.jsonl", store=bare), 2, "empty.jsonl: has no rows")


def test_a_missing_file(run, bare):
    check(run("add-domain", "contracts", "--data", "none.jsonl", store=bare), 3, "There is no file none.jsonl")


def test_too_little_text(run, bare, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')

    result = run("add-domain", "contracts", "--data", "short.jsonl", *SHORT, store=bare)

    assert result.exit_code == 2
    assert "tokens to learn from" in result.stderr
    assert json.loads(run("list", "--json", store=bare).stdout)["domains"][0]["name"] == "general"
    assert run("show", "contracts", store=bare).exit_code == 3


@pytest.mark.parametrize("spec", ["medicine++legal", "medicine:x", "medicine+medicine", "Medicine", ""])
def test_a_bad_composition(run, store, spec):
    check(run("compose", spec, store=store), 2, "Cannot read the composition", "At character")


@pytest.mark.parametrize("ref", ["Medicine", "medicine@", "medicine+legal", "medicine:2"])
def test_a_bad_reference(run, store, ref):
    check(run("show", ref, store=store), 2, f"'{ref}' does not name one version", "write NAME, NAME@2 or NAME@ALIAS")


@pytest.mark.parametrize(("path", "why"), [("./none", "there is no such folder"), ("./", "it has no composition.json")])
def test_a_path_without_a_saved_composition(run, store, path, why):
    check(run("compose", path, store=store), 3, f"no saved composition in {path}", why, "--out")


def test_a_word_that_an_option_does_not_know(run, store):
    result = run("retrain", "medicine", "--mode", "more", store=store)

    check(result, 2, "'more' is not one of 'extend', 'continue', 'fresh'")
    assert "Value error" not in result.stderr


def test_what_cannot_be_removed_is_refused_before_anybody_is_asked(run, store):
    check(run("remove", "general", store=store), 4, "The KP bank cannot be removed")


def test_routing_of_a_static_composition(run, store, tmp_path):
    folder = tmp_path / "static"
    assert run("compose", "medicine:1", "--static", "--out", str(folder), store=store).exit_code == 0

    check(run("route", "some text", "--in", str(folder), store=store), 2, "static composition does not route")
    check(run("generate", "medicine", "x", "--static", "--show-route", store=store), 2, "does not route")


def test_a_composition_is_not_saved_over_other_files(run, store, tmp_path):
    (tmp_path / "mine.txt").touch()

    check(run("compose", "medicine", "--out", str(tmp_path), store=store), 4, "is not empty")


def test_another_base_model(run, bare, base_folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    record = json.loads((bare / "store.json").read_text())
    record["settings"]["source"] = str(base)
    write_sealed(bare / "store.json", json.dumps(record).encode())
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)

    check(run("generate", "general", "Hello", store=bare), 6, "another base model", "weights", "Fix: ")


def test_a_missing_gpu(run, store):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    check(run("generate", "medicine", "Hello", "--device", "cuda", store=store), 6, "no 'cuda' device", "--device cpu")


def test_a_damaged_file(run, bare, document):
    files = document(run("show", "general", "--files", "--json", store=bare))["files"]
    digest = next(f["sha256"] for f in files if f["path"] == "router/router.safetensors").removeprefix("sha256:")
    blob = bare / "blobs" / "sha256" / digest[:2] / digest
    blob.chmod(0o644)
    blob.write_bytes(b"\0" + blob.read_bytes()[1:])

    result = run("generate", "general", "Hello", store=bare)

    assert result.exit_code == 5
    assert digest in result.stderr


def test_no_prompt(run, store):
    check(run("generate", "medicine", store=store, input="\n"), 2, "There is no prompt")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lst"], "No such command 'lst'"),
        (["show"], "Missing argument"),
        (["list", "--jsn"], "No such option: --jsn"),
        (["add-domain", "x", "--rank", "two"], "--rank"),
        (["add-domain", "x", "--schedule", "steep"], "--schedule"),
    ],
)
def test_wrong_usage(run, words, said):
    check(run(*words), 2, said, "--help")


def test_with_json_an_error_is_one_document(run, store):
    result = run("show", "leagl", "--json", store=store)

    error = json.loads(result.stderr)["error"]
    assert (result.exit_code, error["exit"], error["code"]) == (3, 3, "not_found")
    assert "legal" in error["fix"]
    assert json.loads(run("show", "--json").stderr)["error"]["code"] == "usage"


def test_an_unforeseen_error_is_one_line_and_a_way_to_the_traceback(run, store, tmp_path):
    copy = tmp_path / "broken"
    shutil.copytree(store, copy)
    (copy / "domains" / "legal" / "1.json").unlink()
    (copy / "domains" / "legal" / "1.json").mkdir()

    short = run("show", "legal", store=copy)
    long = run("show", "legal", store=copy, env={"LORARY_DEBUG": "1"})

    assert (short.exit_code, long.exit_code) == (1, 1)
    assert "IsADirectoryError" in short.stderr
    assert "LORARY_DEBUG=1" in short.stderr
    assert "Traceback" not in short.stderr
    assert "Traceback" in long.stderr


def test_text_of_others_is_no_markup_and_holds_no_escapes(run, store):
    result = run("show", "[bold]x[/bold]\x1b[31m", store=store, tty=True)

    assert result.exit_code == 2
    assert "[bold]x[/bold]" in result.stderr
    assert "\x1b[31m" not in result.stderr


def test_interrupted_has_its_own_code():
    assert INTERRUPTED == 130


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["compose", "Medicine"], "registry compose medicine"),
        (["compose", "medicine + legal"], "registry compose medicine+legal"),
        (["compose", "medicine,legal"], "registry compose medicine+legal"),
        (["compose", "legal@v1"], "registry compose legal@1"),
        (["show", "Legal"], "registry show legal"),
        (["evaluate", "legal", "--dtype", "bf16"], "registry evaluate legal --dtype bfloat16"),
        (["add-domain", "x", "--lr", "3"], "registry add-domain x --learning-rate 3"),
        (["add", "x"], "registry add-domain x"),
        (["rm", "legal"], "registry remove legal"),
        (["ls"], "registry list"),
        (["help"], "registry --help"),
        (["--version"], "registry version"),
        (["add-domain", "medicine"], "registry retrain medicine --data FILE"),
        (["init", "--store", "a", "b"], "registry init a"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_answered_with_what_was_meant(run, store, words, meant):
    more = {} if words[0] == "init" else {"store": store}
    result = run(*words, **more)

    assert result.exit_code in (2, 3, 4)
    assert meant in result.stderr.splitlines()[-1]
    assert result.stdout == ""


@pytest.mark.parametrize("word", ["compose", "legal@v7", "hf://a/b@v2", "no such, thing!"])
def test_nothing_is_guessed_that_is_not_known(run, store, word):
    assert "did you mean: registry" not in run("compose", word, store=store).stderr or word == "compose"


def test_a_reader_that_has_enough_does_not_change_the_exit_code(store):
    program = f"set -o pipefail; {sys.executable} -m lorary.cli show legal --manifest | head -c 1"
    found = os.environ | {"LORARY_STORE": str(store)}
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False, env=found)

    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")


def test_a_folder_of_other_files_is_not_filled_with_a_registry(run, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")

    result = run("init", str(folder))

    check(result, 2, "is not empty", "thesis.txt", "registry init")
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]
