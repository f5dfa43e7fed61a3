"""Sums that fade: the evidence of a text near its end outweighs that of text further back.

    s_t  =  2^(-step_t) s_(t-1)  +  increment_t

with steps in half-lives: 1 / `HALF_LIFE` at a token of text, none at padding and at tokens of the chat template, and
`RESTART` where another text begins in the same row. So what was read long ago never outweighs what is read now, however
much it was, and float32 is exact enough at any length.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

HALF_LIFE = 32.0  # tokens, by real forward passes on two bases (docs/log.md)
RESTART = 4096.0  # half-lives after which nothing is left: 2^-4096 is 0 in any dtype
TAIL_TOKENS = 6  # of a prompt, at least, that stand after a sentence's end where its text begins to count less
TAIL_STEP = 4.0  # half-lives of a prompt's sentence end
BLOCK = 64  # positions that are summed by one matrix product


def faded_sums(
    increments: Float[Tensor, "batch seq sums"],
    steps: Float[Tensor, "batch seq"],
    before: Float[Tensor, "batch sums"] | None = None,
) -> Float[Tensor, "batch seq sums"]:
    """Return the faded sums up to each position.

    The sequence is cut into blocks: each is summed by a matrix product, and the ends of the blocks are summed in the
    same way.

    Args:
        increments: What each position adds.
        steps: By how many half-lives earlier sums fade at each position, float64.
        before: The sums up to the position before the first.
    """
    passed = steps.cumsum(1)
    sums = _sums(increments, passed)
    return sums if before is None else sums + _left(passed, increments)[..., None] * before[:, None]


def _sums(
    increments: Float[Tensor, "batch seq sums"], passed: Float[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq sums"]:
    batch, seq, width = increments.shape
    if seq == 1:
        return increments
    if seq <= BLOCK:
        return _within(passed, increments) @ increments
    count = -(-seq // BLOCK)
    padding = count * BLOCK - seq
    blocks = torch.nn.functional.pad(increments, (0, 0, 0, padding)).view(batch, count, BLOCK, width)
    # padding repeats the last position's time, so that the times never fall
    times = torch.cat([passed, passed[:, -1:].expand(-1, padding)], dim=1).view(batch, count, BLOCK)
    inside = _within(times, increments) @ blocks
    ends = times[..., -1]
    carried = _sums(inside[:, :, -1], ends)  # up to the end of each block
    left = _left(times[:, 1:] - ends[:, :-1, None], increments)
    inside[:, 1:] += left[..., None] * carried[:, :-1, None]
    return inside.reshape(batch, count * BLOCK, width)[:, :seq]


def _within(
    passed: Float[Tensor, "*blocks positions"], like: Float[Tensor, "*any"]
) -> Float[Tensor, "*blocks positions positions"]:
    """Return what is left at each position of what each earlier one added."""
    return _left(passed[..., :, None] - passed[..., None, :], like).tril()


def _left(passed: Float[Tensor, "*any"], like: Float[Tensor, "*other"]) -> Float[Tensor, "*any"]:
    # later positions would overflow before they are cut away
    return torch.exp2(-passed.clamp(min=0)).to(like.dtype)


def fading_steps(
    is_text: Bool[Tensor, "batch seq"],
    step: float | Float[Tensor, ""],
    *,
    starts: Bool[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """Return the steps of each position, in half-lives.

    Args:
        is_text: False for padding and for tokens of the chat template.
        step: That of a token of text; 0 for sums that do not fade.
        starts: True where a text begins.
    """
    steps = is_text.to(_time_type(is_text.device)) * step
    return steps if starts is None else torch.where(starts, RESTART, steps)


def tail_steps(
    is_text: Bool[Tensor, "batch seq"], is_end: Bool[Tensor, "batch seq"], last: Tensor
) -> Float[Tensor, "batch seq"]:
    """Return additional steps for prompts: what a prompt asks stands near its end.

    At each end of a sentence or line, what is before it fades by `TAIL_STEP` if at least `TAIL_TOKENS` tokens of text
    follow in the prompt.

    Args:
        is_text: False for padding and for tokens of the chat template.
        is_end: True for tokens that end a sentence or a line.
        last: Last position of each prompt, (batch, 1) or (batch, seq); later positions get no additional step.
    """
    positions = torch.arange(is_text.shape[1], device=is_text.device)
    read = is_text.cumsum(1)
    follow = read.gather(1, last.clamp(min=0).expand_as(read)) - read
    counts = is_end & (follow >= TAIL_TOKENS) & (positions < last)
    moved = torch.cat([torch.zeros_like(counts[:, :1]), counts[:, :-1]], dim=1)
    return moved.to(_time_type(is_text.device)) * TAIL_STEP


def _time_type(device: torch.device) -> torch.dtype:
    """Return the dtype of steps; Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
