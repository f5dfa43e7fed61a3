"""Validation while a bank trains: a curve of losses on text that it does not train on, and the best bank along it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from ...domains.data.blocks import NO_TARGET, Blocks
from ...domains.errors import IntegrityError

POINTS = 12  # of the curve, evenly spaced over the planned steps
MAX_BLOCKS = 16  # that are scored at each point, so that validation costs a few percent of the training
BEST_FILE = "best.safetensors"  # of a checkpoint: the best bank until then
KEY = "validation_loss"  # in the Trainer's log


class Validation(TrainerCallback):
    """Callback that measures the curve, keeps the best bank, and ends a training that no longer gets better.

    The curve is kept in the Trainer's log and the best bank in its checkpoints, so a resumed training has both.
    """

    def __init__(self, blocks: Blocks, trained: Mapping[str, nn.Parameter], *, steps: int, batch: int, patience: int):
        self.blocks, self.trained, self.batch, self.patience = blocks, trained, batch, patience
        self.points = {max(1, round(steps * point / POINTS)) for point in range(1, POINTS + 1)}
        self.best: dict[str, Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure one point of the curve, before a checkpoint of this step is written."""
        if state.global_step not in self.points:
            return
        loss = mean_loss(model, self.blocks, batch=self.batch)
        if not math.isfinite(loss):
            raise IntegrityError(
                "Training diverged.",
                cause=f"the validation loss after step {state.global_step} is {loss}",
                fix=f"repeat with a lower learning rate: --learning-rate {args.learning_rate / 3:.1g}",
            )
        if all(loss < earlier for _, earlier in curve(state.log_history)):
            self.best = {name: parameter.detach().clone() for name, parameter in self.trained.items()}
        state.log_history.append({"step": state.global_step, KEY: loss})
        control.should_training_stop |= self.has_ended(state.log_history)
        # what ends here is resumed from here, where the command is killed before it stores the version
        control.should_save |= control.should_training_stop

    def has_ended(self, log: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether a training with this log is over, since nothing has got better for long."""
        found = curve(log)
        return bool(self.patience and found) and len(found) - 1 - found.index(best_point(found)) >= self.patience

    def restore(self) -> None:
        """Set the trained parameters to the best ones, if there are any."""
        with torch.no_grad():
            for name, tensor in self.best.items():
                self.trained[name].copy_(tensor)


def curve(log: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return the steps and losses of a Trainer's log."""
    return [(entry["step"], entry[KEY]) for entry in log if KEY in entry]


def best_point(points: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """Return the first of the points with the smallest loss."""
    return min(points, key=lambda point: point[1])


@torch.no_grad()
def mean_loss(model: PreTrainedModel, blocks: Blocks, *, batch: int) -> float:
    """Return the nats a target token of the first blocks; every module keeps its training mode."""
    modes = {module: module.training for module in model.modules()}
    device, nats, tokens = next(model.parameters()).device, 0.0, 0
    model.eval()
    try:
        for start in range(0, min(len(blocks.input_ids), MAX_BLOCKS), batch):
            stop = min(start + batch, MAX_BLOCKS)
            ids, labels, mask = (
                part[start:stop].to(device) for part in (blocks.input_ids, blocks.labels, blocks.attention_mask)
            )
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            targets = labels[:, 1:]
            nats += F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="sum"
            ).item()
            tokens += int((targets != NO_TARGET).sum())
    finally:
        for module, mode in modes.items():
            module.training = mode
    return nats / max(tokens, 1)
