"""Validation while a bank trains: the curve, the best bank, an early end, and the same bytes after an interruption."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, TrainerCallback

import lorary.adapters.training.validation as validation_module
from lorary.adapters.bank import new_bank
from lorary.adapters.config import BankConfig, TrainingConfig
from lorary.adapters.layer.attach import attach, trained_bank
from lorary.adapters.layer.stack import Stack
from lorary.adapters.training.train import BankTrainer, train_bank
from lorary.adapters.training.validation import BEST_FILE, MAX_BLOCKS, POINTS, mean_loss
from lorary.domains.base_model import find_layout
from lorary.domains.data.blocks import NO_TARGET, Blocks
from lorary.domains.errors import InputError, IntegrityError
from lorary.domains.progress import silent


def blocks_of(seed: int, count: int = 8, length: int = 16) -> Blocks:
    ids = torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(seed))
    return Blocks(ids, ids.clone(), torch.ones_like(ids))


@pytest.fixture
def train(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Callable[..., Any]:
    """`train(validation)` trains a bank on blocks 0; returns the figures, the bank's tensors and the model."""

    def run(validation: Blocks | None = None, *, run: str = "run", **changes: Any) -> tuple[dict[str, Any], Any, Any]:
        base = tiny_llama(vocab_size=64, num_hidden_layers=2)
        layout = find_layout(base)
        bank = new_bank(base, layout, BankConfig(rank=2), generator=torch.Generator().manual_seed(0))
        model = attach(base, Stack(names=("alone",), banks=(bank,), trainable=True), router=None, fixed=torch.ones(1))
        usual = {"steps": 24, "block": 16, "batch": 2, "learning_rate": 0.05, "checkpoint_every": 4}
        config = TrainingConfig(**(usual | changes))
        figures = train_bank(
            model, blocks_of(0), config, run=tmp_path / run, stage="t", on_progress=silent, validation=validation
        )
        return figures, {name: tensor.clone() for name, tensor in trained_bank(model).tensors()}, model

    return run


def test_without_validation_nothing_is_measured(train: Callable[..., Any]) -> None:
    figures, _, _ = train()

    assert "validation" not in figures
    assert figures["steps"] == len(figures["losses"]) == 24


def test_the_kept_bank_is_that_of_the_smallest_loss(train: Callable[..., Any]) -> None:
    """Other random text than that of the training gets worse the longer it is trained."""
    figures, _, model = train(blocks_of(1), patience=0)
    curve = figures["validation"]

    assert len(curve["steps"]) == POINTS
    assert not curve["stopped_early"]
    assert curve["best_step"] == curve["steps"][curve["losses"].index(min(curve["losses"]))] < 24
    assert mean_loss(model, blocks_of(1), batch=3) == pytest.approx(min(curve["losses"]), abs=1e-4)


def test_measuring_changes_no_step(train: Callable[..., Any]) -> None:
    alone, bank, _ = train(run="a")
    measured, same, _ = train(blocks_of(0), run="b", patience=0)  # on its own text the last point is the best

    assert alone["losses"] == measured["losses"]
    assert measured["validation"]["best_step"] == 24
    assert all(torch.equal(bank[name], tensor) for name, tensor in same.items())


def test_training_ends_when_nothing_gets_better(train: Callable[..., Any]) -> None:
    figures, _, _ = train(blocks_of(1), patience=2)
    curve = figures["validation"]

    assert curve["stopped_early"]
    assert figures["steps"] == curve["steps"][-1] < 24
    assert len(curve["losses"]) - 1 - curve["losses"].index(min(curve["losses"])) == 2


class KilledError(Exception):
    pass


class Killer(TrainerCallback):
    """Stops the process after a step, before its checkpoint is written, or right after that."""

    def __init__(self, step: int, *, is_saved: bool):
        self.step, self.is_saved = step, is_saved

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.is_saved:
            raise KilledError

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KilledError


@pytest.mark.parametrize(
    ("last", "is_saved"), [(5, False), (8, False), (8, True), (10, False), (12, True), (17, False)]
)
def test_an_interrupted_training_ends_with_the_same_bank(
    last: int, is_saved: bool, train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was killed before or after a better point, and between that point and its checkpoint."""
    whole, expected, _ = train(blocks_of(1), run="whole", patience=0)
    add = BankTrainer.validate

    def validate(self: BankTrainer, *args: Any, **options: Any) -> None:
        add(self, *args, **options)
        self.add_callback(Killer(last, is_saved=is_saved))  # called after Validation

    with monkeypatch.context() as patch:
        patch.setattr(BankTrainer, "validate", validate)
        with pytest.raises(KilledError):
            train(blocks_of(1), run="killed", patience=0)
    figures, found, _ = train(blocks_of(1), run="killed", patience=0)

    assert figures["resumed_from"] == (last if is_saved else (last - 1) // 4 * 4)
    assert figures["validation"] == whole["validation"]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_training_that_ended_early_stays_ended_when_it_is_resumed(train: Callable[..., Any]) -> None:
    figures, expected, _ = train(blocks_of(1), run="one", patience=2, checkpoint_every=50)

    again, found, _ = train(blocks_of(1), run="one", patience=2, checkpoint_every=50)

    assert figures["validation"]["stopped_early"]
    assert again["resumed_from"] == figures["steps"] == again["steps"]
    assert again["validation"] == figures["validation"]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_checkpoint_without_its_best_bank_is_not_resumed(
    damage: Callable[[Path], object], train: Callable[..., Any], tmp_path: Path
) -> None:
    figures, expected, _ = train(blocks_of(1), run="one", patience=2)
    (newest,) = (tmp_path / "one").glob(f"checkpoint-{figures['steps']}")
    damage(newest / BEST_FILE)

    again, found, _ = train(blocks_of(1), run="one", patience=2)

    assert again["resumed_from"] < figures["steps"]
    assert again["validation"] == figures["validation"]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_validation_loss_that_is_not_finite_is_refused(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation_module, "mean_loss", lambda *_args, **_options: float("nan"))

    with pytest.raises(IntegrityError, match="Training diverged"):
        train(blocks_of(1))


def test_the_loss_is_that_of_the_model_and_leaves_its_mode(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama(vocab_size=64, num_hidden_layers=1).train()
    blocks = blocks_of(3, count=MAX_BLOCKS + 4)
    labels = blocks.labels.clone()
    labels[:, :5] = NO_TARGET

    found = mean_loss(model, replace(blocks, labels=labels), batch=3)

    logits = model.eval()(input_ids=blocks.input_ids[:MAX_BLOCKS]).logits[:, 4:-1]
    expected = F.cross_entropy(logits.flatten(0, 1), blocks.input_ids[:MAX_BLOCKS, 5:].flatten())
    assert found == pytest.approx(expected.item(), rel=1e-5)
    assert model.train().training


@pytest.mark.parametrize("change", [{"validation": 0.6}, {"validation": -0.1}, {"validation": float("nan")}])
def test_a_share_out_of_range_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(InputError, match="validation must be"):
        TrainingConfig(**change)  # type: ignore[arg-type]
