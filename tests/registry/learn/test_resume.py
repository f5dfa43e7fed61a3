"""A run that was killed goes on where it stopped, and ends with the same bytes as one that was not."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorary.registry import Registry
from lorary.registry.learn.run import TrainingRun

# kills itself without any clean-up while it logs step 5 of 6: checkpoints 2 and 4 are complete then
KILLED = """
import os, signal, sys
from lorary.adapters.config import BankConfig, TrainingConfig
from lorary.registry import Registry

stage, store, base, general, cooking = sys.argv[1:]
run = {
    "bank": BankConfig(rank=2, expert_free=0.25),
    "training": TrainingConfig(steps=6, block=64, batch=2, learning_rate=1e-2, checkpoint_every=2),
    "on_progress": lambda p: os.kill(os.getpid(), signal.SIGKILL) if (p.stage, p.done) == (stage, 5) else None,
}
if stage == "training general":
    Registry.init(store, base=base, data=[general], **run)
else:
    Registry.open(store).add_domain("cooking", data=[cooking], **run)
"""


@pytest.fixture(scope="module")
def killed(
    tmp_path_factory: pytest.TempPathFactory, kp_store: Path, base_folder: Path, texts: Any
) -> Callable[[str], Path]:
    """`killed(stage)`: a store whose process was killed in a stage."""

    def run(stage: str) -> Path:
        store = tmp_path_factory.mktemp("killed") / "store"
        if stage != "training general":
            shutil.copytree(kp_store, store)
        command = [sys.executable, "-c", KILLED, stage, store, base_folder, texts["general"], texts["cooking"]]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
        assert done.returncode == -signal.SIGKILL, done.stderr
        return store

    return run


@pytest.fixture(scope="module")
def killed_adding(killed: Callable[[str], Path]) -> Path:
    """A store whose process was killed while `cooking` was trained; tests must not change it."""
    return killed("training cooking")


@pytest.fixture
def add_cooking(texts: Any, short_run: Any) -> Callable[[Registry], Any]:
    """The command that was killed."""
    return lambda registry: registry.add_domain("cooking", data=[texts["cooking"]], **short_run())


def test_a_killed_run_stored_nothing_and_left_two_checkpoints(killed_adding: Path) -> None:
    registry = Registry.open(killed_adding)

    assert registry.store.domains() == ["general"]
    assert _checkpoints(killed_adding) == ["checkpoint-2", "checkpoint-4"]


def test_checkpoints_are_safetensors_and_json_only(killed_adding: Path) -> None:
    found = [path for path in (killed_adding / "runs").rglob("*") if path.is_file()]
    files = {path.name for path in found if path.parent.name not in ("seals", "locks")}

    assert files == {
        "run.json",
        "rare.safetensors",  # of the KP bank's run
        "order.json",
        "bank.safetensors",
        "optimizer.safetensors",
        "random.safetensors",
        "schedule.json",
        "trainer_state.json",
    }


def test_the_same_command_resumes_and_gives_the_same_bytes(
    killed_adding: Path, fresh_copy: Any, add_cooking: Any, whole: Registry
) -> None:
    registry = fresh_copy(killed_adding)
    (run,) = registry.store.runs.glob("cooking-*")

    added = add_cooking(registry)

    assert added.resumed_from == 4
    assert list(registry.store.runs.glob("cooking-*")) == [run]
    assert added.manifest.train["run"] == run.name
    assert added.manifest.digest == whole.show("cooking").digest
    assert added.manifest.files == whole.show("cooking").files
    assert not _checkpoints(registry.store.path)


@pytest.mark.parametrize("file", ["bank.safetensors", "optimizer.safetensors", "trainer_state.json", "schedule.json"])
def test_a_checkpoint_that_was_cut_short_is_passed_over(
    file: str, killed_adding: Path, fresh_copy: Any, add_cooking: Any, whole: Registry
) -> None:
    registry = fresh_copy(killed_adding)
    (path,) = registry.store.runs.glob(f"cooking-*/checkpoint-4/{file}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    added = add_cooking(registry)

    assert added.resumed_from == 2
    assert added.manifest.digest == whole.show("cooking").digest


def test_without_a_complete_checkpoint_the_run_begins_anew(
    killed_adding: Path, fresh_copy: Any, add_cooking: Any, whole: Registry
) -> None:
    registry = fresh_copy(killed_adding)
    for path in registry.store.runs.glob("cooking-*/checkpoint-*/random.safetensors"):
        path.unlink()

    added = add_cooking(registry)

    assert added.resumed_from == 0
    assert added.manifest.digest == whole.show("cooking").digest


def test_other_settings_begin_a_run_of_their_own(
    killed_adding: Path, fresh_copy: Any, texts: Any, short_run: Any
) -> None:
    registry = fresh_copy(killed_adding)

    added = registry.add_domain("cooking", data=[texts["cooking"]], **short_run(steps=1))

    assert added.resumed_from == 0
    assert len(list(registry.store.runs.glob("cooking-*"))) == 2


def test_a_run_that_stopped_after_its_last_step_trains_no_further(
    kp_store: Path, fresh_copy: Any, add_cooking: Any, whole: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = fresh_copy(kp_store)
    with monkeypatch.context() as seam:
        seam.setattr(TrainingRun, "drift", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            add_cooking(registry)
    assert _checkpoints(registry.store.path) == ["checkpoint-4", "checkpoint-6"]

    added = add_cooking(registry)

    assert added.resumed_from == 6
    assert added.manifest.train["losses"] == whole.show("cooking").train["losses"]
    assert added.manifest.digest == whole.show("cooking").digest


def test_an_interrupted_init_resumes(
    killed: Any, base_folder: Path, texts: Any, short_run: Any, whole: Registry
) -> None:
    store = killed("training general")
    assert Registry.open(store).store.domains() == []

    registry = Registry.init(store, base=str(base_folder), data=[texts["general"]], **short_run())

    assert registry.show("general").digest == whole.show("general").digest
    assert not _checkpoints(store)
    assert os.listdir(store / "runs") == [registry.show("general").train["run"]]


def _checkpoints(store: Path) -> list[str]:
    return sorted(path.name for path in store.glob("runs/*/checkpoint-*"))


def _interrupt(*_args: Any, **_options: Any) -> None:
    raise KeyboardInterrupt
