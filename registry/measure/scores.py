"""Scores of one domain's held-out data under one model: texts, questions, and where the router sent the texts."""

from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters.layer.attach import routing_of
from ...domains.progress import OnProgress, Progress
from ...domains.scoring.choices import score_choices
from ...domains.scoring.language import score_language
from ..base.load import LoadedBase
from .held_out import HeldOut
from .score_cache import CellScores

BLOCK: Final = 256  # tokens of a window


class _Observer:
    """Sums slot gates by text over the positions that predicted a counted token."""

    def __init__(self, model: PreTrainedModel, texts: int):
        self._routing = routing_of(model)
        self.gates = torch.zeros(texts, len(self._routing.stack.names), dtype=torch.float64)
        self.positions = torch.zeros(texts, 1, dtype=torch.float64)

    def __call__(self, rows: Sequence[int], predicts: Bool[Tensor, "rows length"]) -> None:
        gate = self._routing.slot_gate
        assert gate is not None
        weight = predicts.double()
        used = gate[:, : predicts.shape[1]].cpu().double()
        texts = torch.tensor(rows)
        self.gates.index_add_(0, texts, torch.einsum("rts,rt->rs", used, weight))
        self.positions.index_add_(0, texts, weight.sum(1, keepdim=True))

    def taken(self) -> dict[str, int]:
        """Texts by the slot that has most of their gate."""
        largest = self.gates[self.positions[:, 0] > 0].argmax(1)
        counts = torch.bincount(largest, minlength=self.gates.shape[1]).tolist()
        return {name: count for name, count in zip(self._routing.stack.names, counts, strict=True) if count}

    def means(self) -> dict[str, float]:
        """Mean gate of each slot over all positions."""
        means = (self.gates.sum(0) / self.positions.sum()).tolist()
        return {name: round(mean, 6) for name, mean in zip(self._routing.stack.names, means, strict=True)}


def score_held_out(
    model: PreTrainedModel, base: LoadedBase, data: HeldOut, *, what: str, on_progress: OnProgress
) -> CellScores:
    """Scores texts and questions; of a routed composition also where the texts went.

    Args:
        model: The base, or a composition over it.
        what: What progress is reported as.
    """
    routing = getattr(model, "routing", None)
    is_routed = routing is not None and routing.router is not None and routing.fixed is None
    observer = _Observer(model, len(data.texts)) if is_routed else None

    def tell(done: int, total: int) -> None:
        on_progress(Progress(what, done, total))

    found = score_language(model, base.tokenizer, data.texts, block=BLOCK, on_progress=tell, on_batch=observer)
    right: tuple[bool, ...] = ()
    if data.questions:
        right = score_choices(model, base.tokenizer, data.questions, on_progress=tell).right
    return CellScores(
        text_nats=found.text_nats,
        text_bytes=found.text_bytes,
        right=right,
        taken=observer.taken() if observer else {},
        gates=observer.means() if observer else {},
    )
