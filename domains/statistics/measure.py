"""Measure the statistics of a domain's text, as routing will see it.

Every example is read alone, from its own start, and without the tokens of the chat template. Feature vectors are the
faded means that the router computes while it reads, in which common tokens weigh little:

- of running text at the positions 1, 2, 4, 8, ... and the last, of windows of `WINDOW` tokens;
- of a prompt, and of each turn of a conversation that somebody wrote, at its end, where its gates are taken; and at the
  end of a long answer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from ..base_model import ModelLayout, hidden_states_at
from ..data.blocks import Blocks, Encoded
from .fading import HALF_LIFE, faded_sums, fading_steps, tail_steps
from .hashed_rows import MAX_ROWS, hashed_moments
from .hashing import HASHED, feature_projection, pair_buckets, signed_places
from .statistics import MIN_COUNT, DomainStatistics, first_projection, rounded
from .token_roles import TokenRoles, count_kinds, ends_of_sentences

WINDOW = 512  # tokens that a feature vector depends on at most
LONG_ANSWER = 32  # tokens
BATCH_TOKENS = 8192
_HASHED_FROM, _HASHED_EVERY = 8, 32  # positions of running text that get rows of hashed features


@dataclass(frozen=True)
class _Window:
    """A piece of an example, and how it is read."""

    ids: list[int]
    is_prompt: bool


def hidden_features(
    hidden: Float[Tensor, "batch seq width"], projection: Float[Tensor, "features width"] | None
) -> Float[Tensor, "batch seq features"]:
    """Normalise hidden states to unit root mean square and project them, in float32."""
    hidden = hidden.float()
    unit = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
    return unit if projection is None else unit @ projection.T


@torch.inference_mode()
def measure_statistics(
    model: PreTrainedModel,
    layout: ModelLayout,
    texts: Sequence[Encoded],
    *,
    layer: int,
    roles: TokenRoles,
    first_edition: bool = False,
    on_batch: Callable[[int, int], None] | None = None,
) -> DomainStatistics:
    """Compute the statistics of encoded examples.

    Args:
        model: The base model.
        layout: Its layout.
        texts: The examples.
        layer: Index of the first decoder layer with experts; features are computed from its input.
        roles: Roles of the tokens.
        first_edition: Compute those of the first edition, for a registry whose KP bank is of it.
        on_batch: Called with the number of finished windows and their total.
    """
    projection = _projection(layout.width, first_edition)
    if first_edition:
        roles = TokenRoles(torch.zeros_like(roles.flags))
    half_life = None if first_edition else HALF_LIFE
    features = layout.width if projection is None else len(projection)
    count, total, outer = 0, torch.zeros(features, dtype=torch.float64), torch.zeros(features, features)
    outer = outer.double()
    windows = [window for text in texts for window in _windows(text, roles)]
    for done, ids, mask, is_prompt in _batches(windows):
        means, positions = _rows_of_batch(model, layout, layer, ids, mask, is_prompt, projection, roles, half_life)
        found = torch.cat([means[row, places] for row, places in enumerate(positions)]).double()
        count, total, outer = count + len(found), total + found.sum(0), outer + found.T @ found
        if on_batch:
            on_batch(done, len(windows))
    tokens, pairs = count_kinds((_text_of(ids, roles) for ids, _ in texts), len(roles.flags))
    if first_edition:
        return DomainStatistics(tokens, pairs, float(count), total, outer)
    hashed = hashed_moments(_hashed_rows(windows, roles, torch.cat([tokens, pairs]) >= MIN_COUNT))
    return DomainStatistics(tokens, pairs, float(count), total, rounded(outer), hashed)


def block_means(
    model: PreTrainedModel,
    layout: ModelLayout,
    blocks: Blocks,
    *,
    layer: int,
    first_edition: bool = False,
    batch: int = 16,
) -> Float[Tensor, "blocks features"]:
    """Return the mean feature vector of each block, for prototypes."""
    device, found = next(model.parameters()).device, []
    for start in range(0, len(blocks.input_ids), batch):
        ids, mask = (part[start : start + batch].to(device) for part in (blocks.input_ids, blocks.attention_mask))
        found.append(text_means(model, layout, ids, mask, layer=layer, first_edition=first_edition))
    return torch.cat(found)


@torch.inference_mode()
def text_means(
    model: PreTrainedModel,
    layout: ModelLayout,
    ids: Tensor,
    mask: Tensor,
    *,
    layer: int,
    first_edition: bool = False,
) -> Float[Tensor, "batch features"]:
    """Return the mean feature vector of each row, without padding."""
    hidden = hidden_states_at(model, layout, layer, input_ids=ids, attention_mask=mask)
    features = hidden_features(hidden.cpu(), _projection(layout.width, first_edition))
    is_real = mask.bool().cpu()[..., None]
    return torch.where(is_real, features, 0.0).sum(1) / is_real.sum(1).clamp(min=1)


def _projection(width: int, first_edition: bool) -> Float[Tensor, "features width"] | None:
    return first_projection(width) if first_edition else feature_projection(width)


def _windows(text: Encoded, roles: TokenRoles) -> Iterator[_Window]:
    """Return the windows of an example; those without a token of text are left out."""
    ids, is_target = text
    if len(ids) == 0:
        return
    if is_target[0] or not any(is_target) or all(is_target[_first_text(ids, roles) :]):
        spans = [(start, False) for start in range(len(ids), 0, -WINDOW)]
    else:  # a prompt or a conversation: where each part that is learned begins, what is before was read as a prompt
        begins = [i for i in range(1, len(ids)) if is_target[i] and not is_target[i - 1]]
        spans = [(end, True) for end in begins]
        if len(ids) - begins[-1] >= LONG_ANSWER:  # a short one is hardly read before it ends
            spans.append((len(ids), False))
    for end, is_prompt in spans:
        piece = ids[max(0, end - WINDOW) : end]
        if not roles.neutral[piece].all():
            yield _Window(piece, is_prompt)


def _first_text(ids: list[int], roles: TokenRoles) -> int:
    return next((i for i, token in enumerate(ids) if not roles.neutral[token]), 0)


def _batches(windows: Sequence[_Window]) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Return windows of similar length together: the number done, ids, mask, and which are prompts."""
    order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids))
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * len(windows[order[stop]].ids) <= BATCH_TOKENS:
            stop += 1
        chosen = [windows[i] for i in order[start:stop]]
        longest = len(chosen[-1].ids)
        ids = torch.tensor([window.ids + [0] * (longest - len(window.ids)) for window in chosen])
        mask = torch.tensor([[True] * len(window.ids) + [False] * (longest - len(window.ids)) for window in chosen])
        yield stop, ids, mask, torch.tensor([window.is_prompt for window in chosen])
        start = stop


def _rows_of_batch(
    model: PreTrainedModel,
    layout: ModelLayout,
    layer: int,
    ids: Int64[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    is_prompt: Bool[Tensor, " batch"],
    projection: Tensor | None,
    roles: TokenRoles,
    half_life: float | None,
) -> tuple[Float[Tensor, "batch seq features"], list[list[int]]]:
    """Return the faded means at all positions, and the positions of each row that are used."""
    device = next(model.parameters()).device
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
    hidden = hidden_states_at(model, layout, layer, **inputs)
    is_text = mask & ~roles.neutral[ids]
    features = torch.where(is_text[..., None], hidden_features(hidden.cpu(), projection), 0.0)
    steps = reading_steps(ids, is_text, is_prompt, roles, half_life)
    weights = is_text.float() if roles.weights is None else torch.where(is_text, roles.weights[ids], 0.0)
    sums = faded_sums(torch.cat([weights[..., None] * features, weights[..., None]], dim=-1), steps)
    places = []
    for prompt, text in zip(is_prompt.tolist(), is_text, strict=True):
        where = text.nonzero().flatten()
        powers = [] if prompt else [2**i - 1 for i in range(len(where).bit_length()) if 2**i < len(where)]
        places.append(where[[*powers, len(where) - 1]].tolist())
    return sums[..., :-1] / sums[..., -1:].clamp(min=1e-6), places


def reading_steps(
    ids: Int64[Tensor, "batch seq"],
    is_text: Bool[Tensor, "batch seq"],
    is_prompt: Bool[Tensor, " batch"],
    roles: TokenRoles,
    half_life: float | None,
) -> Float[Tensor, "batch seq"]:
    """Return the fading steps of texts; some are prompts that are read as a whole."""
    last = torch.full((len(ids), 1), ids.shape[1] - 1)
    tail = tail_steps(is_text, ends_of_sentences(roles.flags[ids]), last)
    return fading_steps(is_text, 0.0 if half_life is None else 1 / half_life) + torch.where(
        is_prompt[:, None], tail, 0.0
    )


def _text_of(ids: Sequence[int], roles: TokenRoles) -> Int64[Tensor, " text"]:
    found = torch.tensor(ids, dtype=torch.int64)
    return found[~roles.neutral[found]]


def _hashed_rows(
    windows: Sequence[_Window], roles: TokenRoles, is_common: Bool[Tensor, " kinds"]
) -> Float[Tensor, "rows hashed"]:
    """Return the rows of hashed features, at the end of each prompt and at positions of running text.

    Tokens and pairs that the text has once are left out, as they are of the counts.
    """
    places, rows = signed_places(len(roles.neutral)), []
    wanted = [_hashed_positions(int((~roles.neutral[window.ids]).sum()), window.is_prompt) for window in windows]
    every = max(1.0, sum(map(len, wanted)) / MAX_ROWS)  # so that no more rows are made than are kept
    seen, next_kept = 0, 0.0
    for window, positions in zip(windows, wanted, strict=True):
        kept = []
        for position in positions:
            if seen >= next_kept:
                kept.append(position)
                next_kept += every
            seen += 1
        if kept:
            rows.append(_hashed_at(window, kept, places, roles, is_common))
    return torch.cat(rows) if rows else torch.zeros(0, HASHED)


def _hashed_positions(length: int, is_prompt: bool) -> list[int]:
    last = length - 1
    if is_prompt or length <= _HASHED_FROM:
        return [last]
    short = [position for position in (_HASHED_FROM - 1, 2 * _HASHED_FROM - 1) if position < last]
    return [*short, *range(_HASHED_EVERY - 1, last, _HASHED_EVERY), last]


def _hashed_at(
    window: _Window, positions: Sequence[int], places: Tensor, roles: TokenRoles, is_common: Bool[Tensor, " kinds"]
) -> Float[Tensor, "rows hashed"]:
    """Return psi / sqrt(number of tokens) at positions of the window's text."""
    ids = torch.tensor([window.ids])
    is_text = ~roles.neutral[ids]
    steps = reading_steps(ids, is_text, torch.tensor([window.is_prompt]), roles, HALF_LIFE).cumsum(1)[is_text]
    text, vocabulary = ids[is_text], len(roles.neutral)
    kinds = torch.cat([text, vocabulary + pair_buckets(text[:-1], text[1:])])
    when = torch.cat([torch.arange(len(text)), torch.arange(1, len(text))])
    signed = places[kinds].long()
    sign = torch.where(signed < HASHED, 1.0, -1.0) * is_common[kinds]
    found = torch.zeros(len(positions), HASHED)
    for row, position in zip(found, positions, strict=True):
        left = torch.exp2(steps - steps[position]).float()  # of each token of text, at this position
        is_read = when <= position
        row.index_add_(0, signed[is_read] % HASHED, (sign * left[when])[is_read])
        row /= math.sqrt(left[: position + 1].sum().item())
    return found
