"""The ablations run end to end; their results are in docs/log.md."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorary.adapters.config import TrainingConfig
from lorary.domains.data.catalog import builtin_domains
from lorary.registry import Registry

SCRIPT = Path(__file__).with_name("ablations.py")
SMALL = ("--max-bytes", "2000")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Stream A, made of bundled corpora."""
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


def measured(out: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (out / "ablations.jsonl").read_text().splitlines()]
    assert len({line["command"] for line in lines}) == len(lines)
    return {line["row"]: line for line in lines}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_bank_is_measured_once_and_in_the_table(data: Path, tmp_path: Path) -> None:
    small = ("--steps", "2", "--block", "64", *SMALL, "--data", data, "--out", tmp_path)

    first = run("--row", "zero", "neighbour", *small)
    again = run("--row", "zero", *small)

    lines = measured(tmp_path)
    assert list(lines) == ["zero", "neighbour"]
    assert lines["zero"]["command"] in first
    assert "already measured" in again
    assert lines["zero"]["parameters"] == lines["neighbour"]["parameters"]
    assert lines["zero"]["losses"] != lines["neighbour"]["losses"]
    assert 0.6 < lines["neighbour"]["similarity"] < 1
    table = run("--table", "--out", tmp_path)
    assert "| legal | zero | 1 1 1 2 2 3 3 3 | 248,832 |" in table
    assert "| legal | neighbour (legal, " in table


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stored_domains_are_composed_in_other_ways(data: Path, tmp_path: Path) -> None:
    few = TrainingConfig(steps=8, block=64)
    registry = Registry.init(tmp_path / "store", training=few)
    for name in ("medicine", "legal"):
        registry.add_domain(name, training=few)
    rows = ("token+pair+hidden", "pair", "no-kp", "known", "static-known", "static-equal")

    run("--row", *rows, "--store", tmp_path / "store", "--data", data, "--out", tmp_path, *SMALL)

    lines = measured(tmp_path)
    assert list(lines) == list(rows)
    assert lines["known"]["share"] == {"medicine": 1.0, "legal": 1.0}
    assert lines["token+pair+hidden"]["share"]["legal"] > lines["static-equal"]["share"]["legal"]
    assert lines["token+pair+hidden"]["share"] != lines["pair"]["share"]
    assert lines["static-known"]["share"]["legal"] == pytest.approx(1.0, abs=0.2)
    assert "| A | static-equal | " in run("--table", "--out", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "error"), [("known", "rows of compositions need --store"), ("zero", "stream B has no domain legal")]
)
def test_missing_options_are_reported_before_anything_is_read(row: str, error: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--row", row, "--stream", "B", "--data", "nowhere", "--out", str(tmp_path)]

    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=SCRIPT.parents[2])

    assert done.returncode == 2
    assert error in done.stderr
