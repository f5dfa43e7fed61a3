"""Packed rows: several texts in one row, told apart by position ids that start again or by cumulative lengths.

transformers' attention masks, flash attention and its data collators for padding-free batches use the same two signs.
Each text is routed as if it were alone.
"""

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor


def text_starts(
    shape: torch.Size, position_ids: Tensor | None, cumulative_lengths: Int[Tensor, " borders"] | None = None
) -> Bool[Tensor, "batch seq"] | None:
    """Return True at the first position of each text; None if each row is one text.

    Reading the positions synchronizes with their device; torch.compile cannot, so there a row may be one text.

    Args:
        shape: (batch, seq).
        position_ids: Of shape (seq,), (1 or batch, seq), or (4, batch, seq) with those of the text first, as in models
            with multimodal positions. Other shapes say nothing about packing.
        cumulative_lengths: `cu_seq_lens_q` of flash attention: where each text of the only row starts, and the end.
    """
    if cumulative_lengths is not None:
        starts = torch.zeros(shape, dtype=torch.bool, device=cumulative_lengths.device)
        starts[0, cumulative_lengths[:-1].long()] = True
    else:
        if position_ids is not None and position_ids.ndim == 3 and len(position_ids) == 4:
            position_ids = position_ids[0]
        if position_ids is None or position_ids.ndim > 2 or position_ids.shape[-1] != shape[1]:
            return None
        starts = (position_ids.diff(prepend=position_ids[..., :1] - 1) != 1).expand(shape).clone()
    starts[:, 0] = True
    return starts if torch.compiler.is_compiling() or bool(starts[:, 1:].any()) else None


def text_ends(starts: Bool[Tensor, "batch seq"]) -> Int64[Tensor, "batch seq"]:
    """Return the last position of each position's text."""
    last = starts.shape[1] - 1
    is_end = torch.cat([starts[:, 1:], torch.ones_like(starts[:, :1])], dim=1)
    positions = torch.where(is_end, torch.arange(last + 1, device=starts.device), last)
    return positions.flip(1).cummin(1).values.flip(1)
