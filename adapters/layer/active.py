"""Which slots a forward pass needs: where its gate is below a threshold a slot is closed, and costs nothing.

`close_small_gates` defines what is skipped, for each position by itself: a slot gate below the threshold is zero. That
is causal, and neither batching, padding nor the way a text is cut changes it. `plan_parts` finds what may be left out
because of it, which changes nothing but the time:

- a few positions (decoding): the slots that are open at any of them, for all rows together;
- a longer text: for each row by itself, a head that has all its open slots (at its start a text is still undecided) and
  a tail that has those still open after the head. The cut is where the least is computed.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

SLOT_THRESHOLD = 1e-4  # an update this small is below what bfloat16 resolves
MIN_TOKENS = 32  # of a row for it to be planned by itself
WORTH_IT = 0.8  # share of the dense work above which it is done densely

Runs = tuple[tuple[int, int], ...]  # ranges of slots that lie side by side: from the first to before the second


class Part(NamedTuple):
    """Some positions, counted over all rows of the batch, and the slots that are open at one of them at least."""

    start: int
    stop: int
    runs: Runs | None  # None: all slots


def close_small_gates(
    slot_gate: Float[Tensor, "batch seq slots"], threshold: float
) -> Float[Tensor, "batch seq slots"]:
    """Set slot gates below the threshold to zero."""
    return torch.where(slot_gate < threshold, 0.0, slot_gate) if threshold else slot_gate


def plan_parts(slot_gate: Float[Tensor, "batch seq slots"]) -> list[Part]:
    """Return what a forward pass under these gates has to compute. Reads values, which makes a program wait for a GPU.

    The parts cover every position once, also those without an open slot.
    """
    is_open = slot_gate != 0
    batch, seq, slots = is_open.shape
    if seq < MIN_TOKENS:
        return [Part(0, batch * seq, _runs(is_open.flatten(0, 1).any(0).nonzero().flatten().tolist(), slots))]
    positions = torch.arange(1, seq + 1, device=slot_gate.device)
    ends = (is_open * positions[None, :, None]).amax(1).tolist()  # by row: each slot is closed from here on
    parts: list[Part] = []
    for row, last in enumerate(ends):
        for part in _row_parts(last, row * seq, seq):
            if parts and parts[-1].runs == part.runs:
                part = Part(parts.pop().start, part.stop, part.runs)
            parts.append(part)
    return parts


def _row_parts(last: list[int], offset: int, seq: int) -> list[Part]:
    """Return head and tail of one row, or all of it as one part."""
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
    """Return slots, given in order, as ranges; none as one that is empty."""
    if len(opened) == slots:
        return None
    if not opened:
        return ((0, 0),)
    starts = [slot for slot in opened if slot - 1 not in opened]
    stops = [slot + 1 for slot in opened if slot + 1 not in opened]
    return tuple(zip(starts, stops, strict=True))
