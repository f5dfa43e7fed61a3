"""The ablations run from end to end; what they found is in docs/log.md, not here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorary.domains.catalog import builtin_domains

SCRIPT = Path(__file__).with_name("ablations.py")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Stream A made of bundled corpora."""
    sources = {"medicine": "medicine", "legal": "legal", "finance": "finance", "math": "code", "general": "general"}
    for name, source in sources.items():
        corpus = builtin_domains()[source].corpus
        assert corpus is not None
        for split in ("train", "test"):
            copy = tmp_path / "data" / name / f"lm.{split}.jsonl"
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(corpus.read_bytes())
    return tmp_path / "data"


def run(*arguments: str | Path) -> str:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=SCRIPT.parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_row_is_measured_once_and_shown(data: Path, tmp_path: Path) -> None:
    small = ("--steps", "2", "--block", "64", "--max-bytes", "2000", "--data", data, "--out", tmp_path)

    first = run("--row", "zero", *small)
    again = run("--row", "zero", *small)
    run("--row", "neighbour", *small)

    lines = [json.loads(line) for line in (tmp_path / "ablations.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == ["zero", "neighbour"]
    assert lines[0]["command"] in first
    assert "measured before" in again
    assert lines[0]["parameters"] == lines[1]["parameters"]
    assert lines[0]["losses"] != lines[1]["losses"]
    assert "| zero | legal | 186,624 |" in run("--table", "--out", tmp_path)
