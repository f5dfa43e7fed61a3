"""A retraining that was killed goes on where it stopped, and ends with the same bytes as one that was not."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorary.registry import Registry

# kills itself without any clean-up while it logs step 5 of 6: checkpoints 2 and 4 are complete then
KILLED = """
import os, signal, sys
from lorary.adapters.config import TrainingConfig
from lorary.registry import Registry

store, new, mode = sys.argv[1:]
Registry.open(store).retrain(
    "cooking",
    data=[new],
    mode=mode,
    tolerance=9.0,
    training=TrainingConfig(steps=6, block=64, batch=2, learning_rate=1e-2, checkpoint_every=2),
    on_progress=lambda p: (p.stage, p.done) == ("training cooking", 5) and os.kill(os.getpid(), signal.SIGKILL),
)
"""


SLOW = pytest.mark.slow


@pytest.mark.parametrize("mode", ["extend", *(pytest.param(mode, marks=SLOW) for mode in ("continue", "fresh"))])
def test_a_killed_retraining_resumes_and_gives_the_same_bytes(
    mode: str, cooking_store: Path, texts: Any, short_run: Any, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"mode": mode, "tolerance": 9.0, "training": short_run()["training"]}
    whole = Registry.open(shutil.copytree(cooking_store, tmp_path / "whole"))
    expected = whole.retrain("cooking", data=[texts["sailing"]], **settings).manifest
    killed = shutil.copytree(cooking_store, tmp_path / "killed")
    command = [sys.executable, "-c", KILLED, killed, texts["sailing"], mode]

    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)

    assert done.returncode == -signal.SIGKILL, done.stderr
    registry = Registry.open(killed)
    assert registry.store.versions("cooking") == [1]
    assert sorted(path.name for path in killed.glob("runs/*/checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    outcome = registry.retrain("cooking", data=[texts["sailing"]], **settings)
    assert outcome.resumed_from == 4
    assert outcome.manifest.digest == expected.digest
    assert outcome.manifest.files == expected.files
    assert not list(killed.glob("runs/*/checkpoint-*"))
