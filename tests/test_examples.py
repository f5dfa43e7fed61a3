"""The scripts of examples/ run from beginning to end with few steps, on a tiny base model; slow: on the pocket base."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
STEPS = ["--steps", "2"]
BASES = ["tiny", pytest.param("pocket", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=BASES)
def short(
    request: pytest.FixtureRequest, tiny_llama: Any, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Few steps, and the base model."""
    if request.param == "pocket":
        return STEPS
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(vocab_size=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return [*STEPS, "--base", str(folder)]


def run(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *words]
    return subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False, capture_output=True, text=True
    )


def test_own_data_to_a_composed_answer(short: list[str], tmp_path: Path):
    done = run("own_data.py", "--store", str(tmp_path / "store"), *short)

    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^beekeeping: \d\.\d+ bits per byte with the base model, \d\.\d+ routed$", done.stdout, re.MULTILINE
    )
    assert re.search(r"^route: .*beekeeping \d\.\d\d", done.stdout, re.MULTILINE)


def test_a_peft_adapter_in_and_out(short: list[str], tmp_path: Path):
    done = run("peft_round_trip.py", "--out", str(tmp_path), *short)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("differs from the composed model by") == 2


def test_a_retention_threshold_in_ci(short: list[str], tmp_path: Path):
    store, page = str(tmp_path / "store"), tmp_path / "report.html"

    holds = run("retention_in_ci.py", "--demo", store, *short, "--threshold", "forgetting<=1", "--html", str(page))
    fails = run("retention_in_ci.py", "--store", store, "--threshold", "retention>=9")

    assert holds.returncode == 0, holds.stderr
    assert page.exists()
    assert fails.returncode == 9, fails.stderr
    assert "do not merge" in fails.stderr


def test_retraining(short: list[str], tmp_path: Path):
    done = run("retrain.py", "--store", str(tmp_path / "store"), *short)

    assert done.returncode == 0, done.stderr
    assert "beekeeping@2" in done.stdout
    assert ", 0 of them damaged" in done.stdout
    assert "Fix: " in done.stdout


def test_every_example_is_tested_and_says_how_it_is_run():
    scripts = sorted(EXAMPLES.glob("*.py"))
    tests = Path(__file__).read_text(encoding="utf-8")

    assert len(scripts) >= 3
    for script in scripts:
        assert f'run("{script.name}"' in tests
        assert f"\n    python examples/{script.name} --" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_use_the_public_api_alone(script: Path):
    imports = re.findall(r"^\s*(?:from|import) (lorary[\w.]*)", script.read_text(encoding="utf-8"), re.MULTILINE)

    assert imports == ["lorary.registry"]


@pytest.mark.parametrize("path", [".github/workflows/ci.yml", "examples/retention.yml"])
def test_workflows_are_valid_yaml(path: str):
    workflow = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))

    assert {"name", "jobs"} < set(workflow)
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        assert all(("uses" in step) != ("run" in step) for step in job["steps"])
