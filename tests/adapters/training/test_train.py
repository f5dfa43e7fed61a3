"""Training of one bank: the balance loss, the loss curve, reporting, checkpoints and resuming."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from lorary.adapters.bank import new_bank
from lorary.adapters.layer.attach import attach, trained_bank
from lorary.adapters.layer.routing import recording_expert_use
from lorary.adapters.layer.stack import Stack
from lorary.adapters.training.train import (
    BankTrainer,
    TrainingConfig,
    balance_loss,
    discard_checkpoints,
    last_checkpoint,
    train_bank,
)
from lorary.domains.base_model import find_layout
from lorary.domains.data.blocks import Blocks
from lorary.domains.progress import Progress, silent

FILES = ["bank.safetensors", "optimizer.safetensors", "random.safetensors", "schedule.json", "trainer_state.json"]


@pytest.fixture(scope="module")
def compose(tiny_llama: Any, bank_config: Any) -> Callable[..., Any]:
    """A composed model with a trainable KP bank."""

    def make(**config: Any) -> Any:
        base = tiny_llama(vocab_size=64).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        bank = new_bank(base, find_layout(base), bank_config(**config), generator=generator)
        stack = Stack(names=("general",), banks=(bank,), trainable=True)
        return attach(base, stack, router=None, fixed=torch.ones(1))

    return make


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    """Twelve rows that count modulo 7 from different starts: easy to learn."""
    ids = 3 + (torch.arange(32).unsqueeze(0) + torch.arange(12).unsqueeze(1)) % 7
    return Blocks(ids, ids, torch.ones_like(ids))


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`train(model, blocks, steps=.., run=..)`: a run of a few steps; other keywords go to the config."""

    def train(
        model: Any,
        blocks: Blocks,
        *,
        run: Path | None = None,
        on_progress: Any = silent,
        report_to: str = "none",
        **changes: Any,
    ) -> Any:
        usual = {"steps": 4, "batch": 2, "block": 32, "learning_rate": 1e-2, "checkpoint_every": 2}
        config = TrainingConfig(**(usual | changes))
        folder = run or tmp_path / "run"
        return train_bank(
            model, blocks, config, run=folder, stage="training x", on_progress=on_progress, report_to=report_to
        )

    return train


# --- balance ---


def test_a_model_without_experts_trains_where_no_balance_is_asked_for(
    train: Any, tiny_llama: Any, blocks: Blocks
) -> None:
    model = tiny_llama(vocab_size=64)
    before = model.lm_head.weight.detach().clone()

    losses = train(model, blocks, balance=0.0)["losses"]

    assert losses[-1] < losses[0]
    assert not torch.equal(before, model.lm_head.weight)


@pytest.mark.parametrize("experts", [1, 2, 3, 8])
def test_balance_is_zero_for_uniform_use(experts: int) -> None:
    use = torch.full((2, 5, experts), 1 / experts)

    assert balance_loss([use], torch.ones(2, 5)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("experts", [1, 2, 3, 8])
def test_balance_is_the_number_of_other_experts_if_one_takes_all(experts: int) -> None:
    use = torch.zeros(2, 5, experts)
    use[..., 0] = 1

    assert balance_loss([use], torch.ones(2, 5)).item() == pytest.approx(experts - 1)


def test_balance_is_computed_from_the_mean_use_not_per_token() -> None:
    use = torch.eye(2).repeat(1, 4, 1)  # one expert per token, both used equally

    assert balance_loss([use], torch.ones(1, 8)).item() == pytest.approx(0)


def test_padding_is_masked_out_of_the_balance() -> None:
    use = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]], [[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])

    assert balance_loss([use], mask).item() == pytest.approx(0)
    assert balance_loss([use], torch.ones(2, 3)).item() > 0.1


def test_a_batch_of_only_padding_has_a_finite_balance() -> None:
    assert balance_loss([torch.full((1, 3, 2), 0.5)], torch.zeros(1, 3)).isfinite()


def test_balance_is_zero_without_a_new_bank() -> None:
    assert balance_loss([], torch.ones(1, 3)).item() == 0


def test_the_balance_has_a_gradient_towards_even_use(compose: Any, blocks: Blocks) -> None:
    model = compose().train()
    with recording_expert_use(model) as use:
        model(input_ids=blocks.input_ids, attention_mask=blocks.attention_mask)

    balance_loss(use, blocks.attention_mask).backward()

    # layer 1 has a single expert, whose gate is constant 1
    largest = [model.model.layers[i].expert_gates.new_expert_gate.grad.abs().max() for i in (1, 2, 3)]
    assert largest[0] < 1e-6
    assert min(largest[1:]) > 1e-3


# --- training ---


def test_the_loss_falls_on_learnable_text(compose: Any, blocks: Blocks, train: Any) -> None:
    figures = train(compose(), blocks, steps=40, learning_rate=3e-2, checkpoint_every=100)

    first, last = figures["losses"][0], figures["losses"][-1]
    assert len(figures["losses"]) == figures["steps"] == 40
    assert last < first - 0.3
    assert figures["tokens"] == 40 * 2 * 32
    assert figures["resumed_from"] == 0


def test_only_the_new_bank_is_trained_and_saved(compose: Any, blocks: Blocks, train: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = compose()
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}

    train(model, blocks)

    changed = {n for n, t in [*model.named_parameters(), *model.named_buffers()] if not torch.equal(t, before[n])}
    new = {name for name in before if name.rpartition(".")[2].startswith("new_") and not name.endswith("new_scale")}
    # the gate of a single expert is constant 1, so its row has no gradient
    assert new - changed <= {"model.layers.1.expert_gates.new_expert_gate"}
    assert changed <= new
    saved = load_file(tmp_path / "run" / "checkpoint-4" / "bank.safetensors")
    assert saved.keys() == new
    assert all(torch.equal(saved[name], model.get_parameter(name)) for name in new)


def test_checkpoints_hold_safetensors_and_json_only(compose: Any, blocks: Blocks, train: Any, tmp_path: Path) -> None:
    train(compose(), blocks, steps=5)

    folders = sorted((tmp_path / "run").iterdir())
    assert [folder.name for folder in folders] == ["checkpoint-4", "checkpoint-5"]
    assert all(sorted(path.name for path in folder.iterdir()) == FILES for folder in folders)


def test_progress_reports_every_step_with_its_loss(compose: Any, blocks: Blocks, train: Any) -> None:
    reports: list[Progress] = []

    figures = train(compose(), blocks, on_progress=reports.append)

    assert [(p.stage, p.done, p.total) for p in reports] == [("training x", i + 1, 4) for i in range(4)]
    assert [round(p.figures["loss"], 4) for p in reports] == figures["losses"]
    assert all(p.figures["tokens_per_second"] > 0 for p in reports)


def test_nothing_is_printed(compose: Any, blocks: Blocks, train: Any, capfd: pytest.CaptureFixture[str]) -> None:
    train(compose(), blocks)

    assert capfd.readouterr() == ("", "")


def test_reporting_integrations_of_transformers_log_the_run(
    compose: Any, blocks: Blocks, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[float] = []

    class Recorder(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.extend([logs["loss"]] if logs and "loss" in logs else [])

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "recorder", Recorder)

    silent_run = train(compose(), blocks)
    assert logged == []
    discard_checkpoints(tmp_path / "run")
    reported_run = train(compose(), blocks, report_to="recorder")

    assert [round(loss, 4) for loss in logged] == reported_run["losses"] == silent_run["losses"]


def test_an_unknown_reporting_integration_is_refused(compose: Any, blocks: Blocks, train: Any) -> None:
    with pytest.raises(ValueError, match="clipboard"):
        train(compose(), blocks, report_to="clipboard")


def test_the_random_states_of_the_caller_are_left_alone(compose: Any, blocks: Blocks, train: Any) -> None:
    model = compose()

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)

    train(model, blocks, seed=3)

    assert draw() == expected


def test_the_model_is_in_evaluation_mode_afterwards(compose: Any, blocks: Blocks, train: Any) -> None:
    model = compose()

    train(model, blocks)

    assert not any(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")  # renamed in 5.23
@pytest.mark.parametrize("changes", [{"accumulation": 2}, {"gradient_checkpointing": True}], ids=str)
def test_settings_that_save_memory_train_as_well(
    changes: dict[str, Any], compose: Any, blocks: Blocks, train: Any
) -> None:
    figures = train(compose(), blocks, **changes)

    assert all(np.isfinite(figures["losses"]))
    assert figures["losses"][-1] < figures["losses"][0]


def test_accumulated_micro_batches_have_the_losses_of_one_batch(
    compose: Any, blocks: Blocks, train: Any, tmp_path: Path
) -> None:
    ids = blocks.input_ids[:1].expand(8, -1)  # identical rows, so that all micro-batches have the same balance loss
    same = Blocks(ids, ids, torch.ones_like(ids))
    whole, accumulated = compose(), compose()

    expected = train(whole, same, steps=2, batch=4, balance=5.0, run=tmp_path / "whole")
    found = train(accumulated, same, steps=2, batch=1, accumulation=4, balance=5.0, run=tmp_path / "accumulated")

    assert found["losses"] == pytest.approx(expected["losses"], abs=2e-4)
    for name, tensor in trained_bank(whole).tensors():
        torch.testing.assert_close(dict(trained_bank(accumulated).tensors())[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")  # renamed in 5.23
def test_gradient_checkpointing_gives_the_same_bank(compose: Any, blocks: Blocks, train: Any, tmp_path: Path) -> None:
    banks = []
    for i, checkpointing in enumerate((False, True)):
        model = compose()
        train(model, blocks, steps=2, gradient_checkpointing=checkpointing, run=tmp_path / str(i))
        banks.append(dict(trained_bank(model).tensors()))

    for name, tensor in banks[0].items():
        torch.testing.assert_close(banks[1][name], tensor, rtol=1e-4, atol=1e-6)


# --- resuming ---


@pytest.fixture(scope="module")
def interrupted_run(compose: Any, blocks: Blocks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def stop(progress: Progress) -> None:
        if progress.done == 5:
            raise KeyboardInterrupt

    run = tmp_path_factory.mktemp("stopped")
    config = TrainingConfig(steps=6, batch=2, block=32, learning_rate=1e-2, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        train_bank(compose(), blocks, config, run=run, stage="training x", on_progress=stop)
    return run


@pytest.fixture
def stopped(interrupted_run: Path, tmp_path: Path) -> Path:
    """Folder of a run of six steps interrupted at the fifth: checkpoints 2 and 4."""
    return Path(shutil.copytree(interrupted_run, tmp_path / "stopped"))


def test_a_resumed_run_ends_with_the_same_bytes(stopped: Path, compose: Any, blocks: Blocks, train: Any) -> None:
    whole, resumed = compose(), compose()
    expected = train(whole, blocks, steps=6)

    figures = train(resumed, blocks, steps=6, run=stopped)

    assert figures["resumed_from"] == 4
    assert figures["losses"] == expected["losses"]
    found = dict(trained_bank(resumed).tensors())
    assert all(torch.equal(tensor, found[name]) for name, tensor in trained_bank(whole).tensors())


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["truncated", "missing", "empty"])
def test_an_incomplete_checkpoint_is_skipped(file: str, damage: str, stopped: Path) -> None:
    path = stopped / "checkpoint-4" / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if damage == "truncated" else 0])

    assert last_checkpoint(stopped) == stopped / "checkpoint-2"


def test_checkpoints_are_ordered_by_step_not_by_name(stopped: Path) -> None:
    (stopped / "checkpoint-4").rename(stopped / "checkpoint-10")

    assert last_checkpoint(stopped) == stopped / "checkpoint-10"


def test_a_folder_that_is_no_checkpoint_is_skipped(stopped: Path) -> None:
    (stopped / "checkpoint-best").mkdir()

    assert last_checkpoint(stopped) == stopped / "checkpoint-4"


def test_without_a_checkpoint_none_is_returned(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None


def test_discarding_deletes_checkpoints_and_nothing_else(stopped: Path) -> None:
    (stopped / "run.json").write_text("{}", encoding="utf-8")

    discard_checkpoints(stopped)

    assert [path.name for path in stopped.iterdir()] == ["run.json"]


def test_a_finished_run_is_loaded_without_another_step(
    compose: Any, blocks: Blocks, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = compose(), compose()
    expected = train(first, blocks)
    monkeypatch.setattr(BankTrainer, "training_step", None)  # fails if it is called

    figures = train(second, blocks)

    assert figures["resumed_from"] == 4
    assert figures["losses"] == expected["losses"]
    found = dict(trained_bank(second).tensors())
    assert all(torch.equal(tensor, found[name]) for name, tensor in trained_bank(first).tensors())


def test_the_schedule_of_a_checkpoint_is_plain_json(stopped: Path) -> None:
    schedule = json.loads((stopped / "checkpoint-4" / "schedule.json").read_text(encoding="utf-8"))

    assert schedule["last_epoch"] == 4
    assert all(isinstance(rate, float) for rate in schedule["_last_lr"])
