"""Commands that compute nothing load nothing heavy, and start fast."""

import json
import os
import resource
import subprocess
import sys

PROGRAM = """
import json, sys
from lorary.cli.app import main
heavy = {"torch", "transformers", "faiss", "numpy", "huggingface_hub", "accelerate", "datasets", "tokenizers"}
loaded = {}
for words in json.loads(sys.argv[1]):
    sys.argv = ["registry", *words]
    try:
        main()
    except SystemExit as end:
        loaded[" ".join(words)] = [end.code, sorted(heavy & set(sys.modules))]
print(json.dumps(loaded), file=sys.stderr)
"""


def test_nothing_heavy_is_loaded(store, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{\n")
    works = [
        [], ["--help"], ["add-domain", "--help"], ["list"], ["list", "--json"], ["show", "legal"],
        ["show", "legal", "--files"], ["show", "legal", "--manifest"], ["compose", "medicine+legal"],
        ["compose", "medicine", "--static", "--json"], ["compose", "medicine", "--out", str(tmp_path / "out")],
        ["compose", str(tmp_path / "out")], ["version"],
        ["log"], ["log", "legal", "--json"], ["alias", "legal"], ["alias", "legal", "latest"],
    ]  # fmt: skip
    fails = [
        ["lst"], ["show"], ["show", "leagl"], ["compose", "+"], ["add-domain", "Bad Name"], ["add-domain", "medecine"],
        ["add-domain", "medicine"], ["add-domain", "general"],
        ["add-domain", "contracts", "--data", str(tmp_path / "bad.jsonl")], ["add-domain", "x", "--experts", "0.1"],
        ["retrain", "legal"], ["retrain", "general", "--data", "x.jsonl"], ["retrain", "legal", "--data", "x.jsonl"],
        ["remove", "legal@7", "-y"], ["remove", "legal"], ["restore", "legal"],
        ["init", "--rank", "0"], ["init", "--alpha", "-1"], ["quickstart", str(store)], ["generate", "medicine"],
    ]  # fmt: skip
    command = [sys.executable, "-c", PROGRAM, json.dumps(works + fails)]

    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"LORARY_STORE": str(store)},
    )

    loaded = json.loads(done.stderr.splitlines()[-1])
    assert len(loaded) == len(works) + len(fails)
    assert {words: heavy for words, (_, heavy) in loaded.items() if heavy} == {}
    assert [words for words in map(" ".join, works) if loaded[words][0] != 0] == []
    assert [words for words in map(" ".join, fails) if loaded[words][0] == 0] == []


def test_help_starts_fast():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)

    subprocess.run([sys.executable, "-m", "lorary.cli", "--help"], check=True, capture_output=True)

    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # 0.3 s of processor time on the machine it was written on; the clock on the wall depends on who else works there
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.9


def test_a_reader_that_stops_early_is_no_error(store):
    command = f"{sys.executable} -m lorary.cli show legal --manifest --store {store} | head -c 1"

    done = subprocess.run(["sh", "-c", command], check=True, capture_output=True, text=True)

    assert done.stdout == "{"
    assert done.stderr == ""


def test_a_terminal_gets_a_table(store):
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "lorary.cli", "list", "--store", str(store)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    drawn = b""
    try:
        while part := os.read(ours, 4096):
            drawn += part
    except OSError:  # the other side is closed
        pass
    os.close(ours)

    assert process.wait() == 0
    assert b"medicine" in drawn
    assert b"\t" not in drawn
