"""Train the new bank of a composed model with transformers' Trainer; everything else stays frozen.

Trainer provides mixed precision, gradient accumulation, distributed training, resuming and reporting. Checkpoints are
written here instead: they hold the new bank, the optimizer and the scheduler as safetensors and JSON, never pickle.
"""

import json
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from ...domains.data.blocks import Blocks
from ...domains.errors import IncompatibleError, IntegrityError
from ...domains.linear import is_quantised, linear_shape
from ...domains.progress import OnProgress, Progress
from ..config import TrainingConfig
from ..layer.routing import recording_expert_use
from .validation import BEST_FILE, Validation, best_point, curve

BANK_FILE, OPTIMIZER_FILE, RANDOM_FILE, SCHEDULE_FILE, STATE_FILE = (
    "bank.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "schedule.json",
    "trainer_state.json",
)
CHECKPOINT_SECONDS = 120  # after which a checkpoint is written, whatever the steps


class BlockDataset(Dataset):
    """Map-style dataset over packed blocks."""

    def __init__(self, blocks: Blocks):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.blocks.input_ids[index],
            "labels": self.blocks.labels[index],
            "attention_mask": self.blocks.attention_mask[index],
        }


def train_bank(
    model: PreTrainedModel,
    blocks: Blocks,
    config: TrainingConfig,
    *,
    run: Path,
    stage: str,
    on_progress: OnProgress,
    report_to: str = "none",
    validation: Blocks | None = None,
) -> dict[str, Any]:
    """Train the model's trainable bank in place, resuming from the last complete checkpoint in `run`, if any.

    Args:
        run: Folder of the checkpoints.
        stage: Name of the stage in progress reports.
        report_to: Integration that logs the run, as in `transformers.TrainingArguments`: "tensorboard", "wandb", "all".
        validation: Text to measure the training by. The best bank along the curve is kept, and training ends early.

    Returns:
        Figures of the run: steps, tokens, the loss of every step, the step resumed from, seconds; and the validation
        curve with the step whose bank was kept.

    Raises:
        IncompatibleError: The base model is quantised in a way that no gradient passes.
        IntegrityError: The loss became NaN or infinite.
    """
    steps = config.planned_steps(len(blocks.input_ids))
    learning_rate = config.for_width(model.config.get_text_config().hidden_size).learning_rate
    assert learning_rate is not None
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=steps,
        per_device_train_batch_size=config.batch,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(config.warmup * steps)),
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=config.checkpoint_every,
        save_total_limit=2,
        seed=config.seed,
        data_seed=config.seed,
        report_to=report_to,
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=False,
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # Trainer would wrap the model in nn.DataParallel
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens_per_step = config.batch * config.accumulation * blocks.input_ids.shape[1]
    progress = _ProgressCallback(stage, steps, tokens_per_step, on_progress)
    checkpoint = last_checkpoint(run)
    resumed_from = 0 if checkpoint is None else _step_of(checkpoint)
    began = time.monotonic()
    with _preserved_random_state(model.device):
        with _beside_quantised_weights(model):
            trainer = BankTrainer(
                model=model,
                args=arguments,
                train_dataset=BlockDataset(blocks),
                callbacks=[progress, _CheckpointCallback()],
                balance=config.balance,
            )
            if validation is not None:
                trainer.validate(validation, steps=steps, batch=config.batch, patience=config.patience)
        trainer.remove_callback(PrinterCallback)  # what Trainer adds where tqdm is disabled
        if checkpoint is not None and (resumed_from >= steps or trainer.had_ended(checkpoint)):
            trainer.load_finished(checkpoint)
        else:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        validated = _validation_figures(trainer, steps)
    model.eval()
    if trainer.validation is not None:
        trainer.validation.restore()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return validated | {
        "steps": len(losses),
        "tokens": len(losses) * tokens_per_step,
        "losses": [round(loss, 4) for loss in losses],
        "resumed_from": resumed_from,
        "seconds": round(time.monotonic() - began, 1),
    }


class BankTrainer(Trainer):
    """Trainer whose checkpoints hold the trainable parameters only, as safetensors and JSON."""

    def __init__(self, *, balance: float, **arguments: Any):
        super().__init__(**arguments)
        self._balance = balance
        self._composed: PreTrainedModel = arguments["model"]
        self._trained = {name: p for name, p in self._composed.named_parameters() if p.requires_grad}
        self.validation: Validation | None = None

    def validate(self, blocks: Blocks, *, steps: int, batch: int, patience: int) -> None:
        """Measure the training by these blocks."""
        self.validation = Validation(blocks, self._trained, steps=steps, batch=batch, patience=patience)
        self.add_callback(self.validation)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the language-model loss plus the weighted balance loss of the new bank."""
        with recording_expert_use(self._composed) if self._balance else nullcontext([]) as use:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        assert isinstance(loss, Tensor)
        # the model normalizes by the tokens of the whole step, so its losses add up; the balance loss is averaged
        is_summed = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        micro_batches = self.current_gradient_accumulation_steps if is_summed else 1
        return loss + self._balance / micro_batches * balance_loss(use, inputs["attention_mask"])

    def had_ended(self, checkpoint: Path) -> bool:
        """Return whether a training ended early at this checkpoint."""
        return self.validation is not None and self.validation.has_ended(_log_of(checkpoint))

    def load_finished(self, checkpoint: Path) -> None:
        """Load the checkpoint of a finished run; `train` would resume there and take one step too many."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in self._trained.items()}, folder / BANK_FILE)
        if self.validation is not None and self.validation.best:
            save_file(self.validation.best, folder / BEST_FILE)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer, scheduler = self._optimizer_and_scheduler()
        state = optimizer.state_dict()["state"]
        tensors = {f"{i}.{key}": torch.as_tensor(value) for i, entry in state.items() for key, value in entry.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(output_dir) / OPTIMIZER_FILE)
        schedule = {key: value for key, value in scheduler.state_dict().items() if _is_plain(value)}
        (Path(output_dir) / SCHEDULE_FILE).write_text(json.dumps(schedule), encoding="utf-8")

    def _save_rng_state(self, output_dir: str) -> None:
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        save_file(states, Path(output_dir) / RANDOM_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / BANK_FILE)
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(saved[name])
        if self.validation is not None and (Path(resume_from_checkpoint) / BEST_FILE).is_file():
            self.validation.best = load_file(Path(resume_from_checkpoint) / BEST_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in load_file(Path(checkpoint) / OPTIMIZER_FILE).items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        optimizer, scheduler = self._optimizer_and_scheduler()
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        schedule = json.loads((Path(checkpoint) / SCHEDULE_FILE).read_text(encoding="utf-8"))
        scheduler.load_state_dict({**scheduler.state_dict(), **schedule})
        for group, rate in zip(optimizer.param_groups, schedule["_last_lr"], strict=True):
            group["lr"] = rate

    def _optimizer_and_scheduler(self) -> tuple[Any, Any]:
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        return self.optimizer, self.lr_scheduler

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        states = load_file(Path(checkpoint) / RANDOM_FILE)
        torch.set_rng_state(states.pop("cpu"))
        for name, state in states.items():
            torch.cuda.set_rng_state(state, int(name.removeprefix("cuda")))


def balance_loss(
    expert_use: Sequence[Float[Tensor, "batch seq _"]], mask: Shaped[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    """Return the load-balancing loss of the new bank: the mean over layers of n * sum_e use_e^2 - 1.

    n is the layer's number of new experts and `use_e` the mean gate of expert e over the tokens that `mask` keeps. The
    loss is 0 for uniform use and n - 1 if one expert takes all. It is a soft form of the importance loss of Shazeer et
    al. 2017 (arXiv:1701.06538) that is also defined for a batch of one.

    Args:
        expert_use: The new experts' gates of each layer (`recording_expert_use`).
        mask: Nonzero where a position holds text.
    """
    weight = mask.to(torch.float32).unsqueeze(-1)
    losses = []
    for gates in expert_use:
        use = (gates * weight).sum((0, 1)) / weight.sum().clamp(min=1)
        losses.append(len(use) * use.square().sum() - 1)
    return torch.stack(losses).mean() if losses else weight.new_zeros(())


def _validation_figures(trainer: BankTrainer, steps: int) -> dict[str, Any]:
    points = curve(trainer.state.log_history)
    if not points:
        return {}
    return {
        "validation": {
            "steps": [step for step, _ in points],
            "losses": [round(loss, 4) for _, loss in points],
            "best_step": best_point(points)[0],
            "stopped_early": trainer.state.global_step < steps,
        }
    }


def divergence_error(cause: str, learning_rate: float) -> IntegrityError:
    """Return the error for a diverged run; its fix is a third of the learning rate."""
    return IntegrityError(
        "Training diverged.",
        cause=cause,
        fix=f"repeat with a lower learning rate: --learning-rate {learning_rate / 3:.1g}",
    )


def last_checkpoint(run: Path) -> Path | None:
    """Return the newest complete checkpoint of a run; one that was interrupted while it was written is skipped."""
    numbered = [folder for folder in run.glob("checkpoint-*") if folder.name.rpartition("-")[2].isdecimal()]
    folders = sorted(numbered, key=_step_of, reverse=True)
    return next((folder for folder in folders if _is_complete(folder)), None)


def discard_checkpoints(run: Path) -> None:
    """Delete all checkpoints of a run."""
    for folder in run.glob("checkpoint-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _log_of(checkpoint: Path) -> list[dict[str, Any]]:
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["log_history"]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


@contextmanager
def _beside_quantised_weights(model: PreTrainedModel) -> Iterator[None]:
    """Let Trainer accept a quantised base model, as it does with PEFT's adapters: the experts are what is trained.

    Raises:
        IncompatibleError: transformers says that the quantisation cannot be trained beside, or no gradient passes it.
    """
    quantised = [module for module in model.modules() if is_quantised(module)]
    if not quantised:
        yield
        return
    quantizer: Any = getattr(model, "hf_quantizer", None)
    one_of_each = {type(module): module for module in quantised}.values()
    if not getattr(quantizer, "is_trainable", True) or not all(
        _passes_gradients(part, model.dtype) for part in one_of_each
    ):
        kinds = ", ".join(sorted({type(module).__name__ for module in quantised}))
        raise IncompatibleError(
            "Experts cannot be trained beside this base model.",
            cause=f"no gradient passes its quantised modules ({kinds})",
            fix="train on bitsandbytes (nf4, int8), torchao int8 or GPTQ weights, or on the base in full precision",
        )
    model._hf_peft_config_loaded = True  # what Trainer asks for; read when it is built
    try:
        yield
    finally:
        del model._hf_peft_config_loaded


def _passes_gradients(module: nn.Module, dtype: torch.dtype) -> bool:
    device = next(iter([*module.parameters(), *module.buffers()])).device
    with torch.enable_grad():
        x = torch.zeros(1, linear_shape(module)[0], dtype=dtype, device=device, requires_grad=True)
        return module(x).requires_grad


@contextmanager
def _preserved_random_state(device: torch.device) -> Iterator[None]:
    """Restore the global random states of Python, NumPy and torch on exit: Trainer seeds all three."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _is_complete(folder: Path) -> bool:
    try:
        json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))  # Trainer writes it last
        json.loads((folder / SCHEDULE_FILE).read_text(encoding="utf-8"))
        best = [BEST_FILE] if curve(_log_of(folder)) else []
        for name in (BANK_FILE, OPTIMIZER_FILE, RANDOM_FILE, *best):
            with safe_open(folder / name, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return True


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | list) and not (isinstance(value, list) and any(map(callable, value)))


class _CheckpointCallback(TrainerCallback):
    """Callback that asks for a checkpoint every two minutes, so that no more is lost on large models."""

    def __init__(self) -> None:
        self._saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() - self._saved >= CHECKPOINT_SECONDS:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        self._saved = time.monotonic()


class _ProgressCallback(TrainerCallback):
    """Callback that forwards Trainer's logs to `on_progress` and stops a run whose loss is not finite."""

    def __init__(self, stage: str, steps: int, tokens_per_step: int, on_progress: OnProgress):
        self.stage = stage
        self.steps = steps
        self.tokens_per_step = tokens_per_step
        self.on_progress = on_progress
        self._began = time.monotonic()
        self._first_step = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._began, self._first_step = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                raise divergence_error(f"the loss of step {state.global_step} is {loss}", args.learning_rate)
            seconds = max(time.monotonic() - self._began, 1e-9)
            tokens = (state.global_step - self._first_step) * self.tokens_per_step
            figures = {"loss": loss, "tokens_per_second": tokens / seconds}
            self.on_progress(Progress(self.stage, state.global_step, self.steps, figures))
