"""Select the slots that a forward pass computes: a slot whose gate is below the threshold is closed and skipped.

`close_small_gates` sets each slot gate below the threshold to zero, position by position. The result is causal and does
not depend on batching, padding or how a text is split into forward passes. `plan_parts` finds the work that this makes
unnecessary; it affects speed only:

- few positions (decoding): the union of the slots that are open at any position of any row;
- longer texts: for each row, a head with all its open slots (routing is still undecided at the start of a text) and a
  tail with those still open after the head. The cut minimizes the work.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

SLOT_THRESHOLD = 1e-4  # an update this small is below what bfloat16 resolves
MIN_TOKENS = 32  # shortest row that is planned separately
WORTH_IT = 0.8  # share of the dense work above which a row is not split

Runs = tuple[tuple[int, int], ...]  # half-open ranges of adjacent slots: (start, stop)


class Part(NamedTuple):
    """Range of flattened (batch, seq) positions and the slots that are open at any of them."""

    start: int
    stop: int
    runs: Runs | None  # None: all slots


def close_small_gates(
    slot_gate: Float[Tensor, "batch seq slots"], threshold: float
) -> Float[Tensor, "batch seq slots"]:
    """Set slot gates below the threshold to zero."""
    return torch.where(slot_gate < threshold, 0.0, slot_gate) if threshold else slot_gate


def plan_parts(slot_gate: Float[Tensor, "batch seq slots"]) -> list[Part]:
    """Return the parts that a forward pass with these gates has to compute.

    The parts cover every position exactly once, including positions without an open slot. Reading the gates
    synchronizes with the device.
    """
    is_open = slot_gate != 0
    batch, seq, slots = is_open.shape
    if seq < MIN_TOKENS:
        return [Part(0, batch * seq, _runs(is_open.flatten(0, 1).any(0).nonzero().flatten().tolist(), slots))]
    positions = torch.arange(1, seq + 1, device=slot_gate.device)
    ends = (is_open * positions[None, :, None]).amax(1).tolist()  # by row: each slot is closed from this position on
    parts: list[Part] = []
    for row, last in enumerate(ends):
        for part in _row_parts(last, row * seq, seq):
            if parts and parts[-1].runs == part.runs:
                part = Part(parts.pop().start, part.stop, part.runs)
            parts.append(part)
    return parts


def _row_parts(last: list[int], offset: int, seq: int) -> list[Part]:
    """Return the head and tail of one row, or the whole row as one part."""
    opened = [slot for slot, end in enumerate(last) if end]

    def work(cut: int) -> int:
        return cut * len(opened) + (seq - cut) * sum(end > cut for end in last)

    cut = min([0, *last], key=work)
    if work(cut) > WORTH_IT * seq * len(opened):
        return [Part(offset, offset + seq, _runs(opened, len(last)))]
    still = [slot for slot, end in enumerate(last) if end > cut]
    head = [Part(offset, offset + cut, _runs(opened, len(last)))] if cut else []
    tail = [Part(offset + cut, offset + seq, _runs(still, len(last)))] if cut < seq else []
    return head + tail


def _runs(opened: list[int], slots: int) -> Runs | None:
    """Return sorted slots as ranges; no slots as one empty range, all slots as None."""
    if len(opened) == slots:
        return None
    if not opened:
        return ((0, 0),)
    starts = [slot for slot in opened if slot - 1 not in opened]
    stops = [slot + 1 for slot in opened if slot + 1 not in opened]
    return tuple(zip(starts, stops, strict=True))
