"""The retention benchmark runs end to end; its figures are in docs/benchmarks.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorary.domains.data.catalog import builtin_domains

SCRIPT = Path(__file__).with_name("retention.py")
METHODS = ("ours", "separate", "sequential", "joint", "olora", "replay", "arrow", "xlora", "anyssr", "lorauter")
FILES = {
    "general/lm": "general",
    "medicine/medquad_qa": "medicine",
    "legal/cuad_clause_type": "legal",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The first two domains of stream C, made of bundled questions."""
    for path, name in FILES.items():
        questions = builtin_domains()[name].questions
        assert questions is not None
        for split in ("train", "test"):
            copy = tmp_path / "data" / f"{path}.{split}.jsonl"
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(questions.read_bytes())
    return tmp_path / "data"


def run(*arguments: str | Path) -> str:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=SCRIPT.parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_method_runs_and_is_in_the_table(data: Path, tmp_path: Path):
    out = tmp_path / "out"
    small = ("--steps", "2", "--domains", "2", "--max-bytes", "2000", "--questions", "4")

    general = data / "general" / "lm.train.jsonl"
    run("--stream", "C", "--method", *METHODS, "--data", data, "--out", out, "--general", general, *small)
    tables = run("--table", "--out", out, "--plot", tmp_path / "plot.svg")

    results = {path.stem: json.loads(path.read_text()) for path in (out / "results").iterdir()}
    assert set(results) == {f"C-{method}-forward-0-0.0104" for method in METHODS}
    assert all(f"\n| {method} | " in tables for method in METHODS)
    assert all(f">{method}</text>" in (tmp_path / "plot.svg").read_text() for method in METHODS)
    ours = results["C-ours-forward-0-0.0104"]
    notes = ours["notes"]["cuad"]
    assert notes["explicit_at_the_end"]["medquad"]["bits"] == ours["notes"]["medquad"]["explicit"]["bits"]
    assert max(notes["order_invariance"].values()) <= 1e-6


@pytest.mark.slow
def test_a_second_run_trains_and_scores_nothing(data: Path, tmp_path: Path):
    out = tmp_path / "out"
    command = ("--stream", "C", "--method", "separate", "--data", data, "--out", out, "--steps", "2", "--domains", "1")
    run(*command)
    kept = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.parent.name != "results"
    }

    run(*command)

    after = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.parent.name != "results"
    }
    assert after == kept
