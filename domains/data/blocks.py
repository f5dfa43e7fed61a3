"""Blocks: examples as tokens, packed into rows of equal length to learn from.

`encode` turns one example into ids and marks the tokens that are to be learned (targets); `pack_blocks` cuts and packs.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .example import Example

NO_TARGET = -100  # the label that PyTorch's cross entropy ignores
MIN_TARGETS = 64  # tokens; with less there is nothing to learn

Encoded = tuple[list[int], list[bool]]


@dataclass(frozen=True)
class Blocks:
    """Packed text. Padding is on the right: id 0, label -100, attention 0."""

    input_ids: Int64[Tensor, "blocks block"]
    labels: Int64[Tensor, "blocks block"]  # input_ids where a token is a target, else -100; not shifted
    attention_mask: Int64[Tensor, "blocks block"]


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """The tokens of an example, and which of them are targets.

    A text is: what the tokenizer puts before every text (usually one begin token), the text, the end token if there is
    one. All but the beginning are targets. Of a prompt with its completion only the completion and the end token are
    targets; both are tokenised apart, so that the boundary is the one that generation meets. A conversation is rendered
    by the tokenizer's chat template; the turns of the assistant, with the token that ends them, are targets.

    Raises:
        InputError: A conversation, and the tokenizer has no chat template or one that cannot render it.
    """
    if example.messages:
        return _encode_messages(example, tokenizer)
    if not example.prompt:
        before, learned = begin_ids(tokenizer), _ids(example.completion, tokenizer)
    else:
        before = begin_ids(tokenizer) + _ids(example.prompt, tokenizer)
        learned = _following_ids(example.continuation, tokenizer)
    learned = learned + end_ids(tokenizer)
    return before + learned, [False] * len(before) + [True] * len(learned)


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before every text: usually its begin token, or none."""
    whole, plain = tokenizer("a")["input_ids"], _ids("a", tokenizer)
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends a text, or none."""
    token: Any = tokenizer.eos_token_id
    return [] if token is None else [token]


def pack_blocks(encoded: Iterable[Encoded], block: int, *, least: int = MIN_TARGETS) -> Blocks:
    """Packs encoded examples into rows of `block` tokens; every target token is in exactly one place.

    An example that is longer than a block is cut from its end, so that a completion keeps as much of its prompt as
    fits; pieces without a target are left out. A piece goes whole into the fullest block that still has room for it,
    longest pieces first; inside a block and between blocks the order is that of the examples. Pieces in one block see
    each other. The first token of a block is predicted from nothing, so its label does not count in the usual shifted
    loss.

    Raises:
        InputError: There are fewer than `least` targets.
    """
    if block < 2:
        raise ValueError(f"block is {block}, expected at least 2")
    pieces = [piece for ids, is_target in encoded for piece in _cut(ids, is_target, block) if any(piece[1])]
    targets = sum(sum(is_target) for _, is_target in pieces)
    if targets < max(least, 1):
        raise InputError(
            f"The data has {targets} tokens to learn from; at least {max(least, 1)} are needed.",
            fix="give more text: some ten thousand words make a domain",
        )
    groups = _fit([len(ids) for ids, _ in pieces], block)
    return _fill([[pieces[i] for i in group] for group in groups], block)


def _cut(ids: list[int], is_target: list[bool], block: int) -> list[Encoded]:
    first = len(ids) % block
    bounds = [0, *range(first or block, len(ids) + 1, block)]
    return [(ids[a:b], is_target[a:b]) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]


def _fit(lengths: Sequence[int], block: int) -> list[list[int]]:
    """Which pieces share a block: best fit, longest first."""
    groups: list[list[int]] = []
    rooms: list[int] = []  # sorted, each once
    groups_with: dict[int, list[int]] = {}  # room -> groups that have it
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(rooms, lengths[piece])
        if place == len(rooms):
            room, group = block, len(groups)
            groups.append([])
        else:
            room = rooms[place]
            group = groups_with[room].pop()
            if not groups_with[room]:
                del groups_with[rooms.pop(place)]
        groups[group].append(piece)
        if left := room - lengths[piece]:
            if left not in groups_with:
                insort(rooms, left)
            groups_with.setdefault(left, []).append(group)
    return sorted(sorted(group) for group in groups)


def _fill(groups: list[list[Encoded]], block: int) -> Blocks:
    input_ids = torch.zeros(len(groups), block, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, NO_TARGET)
    for row, group in enumerate(groups):
        ids = torch.tensor([token for piece, _ in group for token in piece])
        is_target = torch.tensor([flag for _, flags in group for flag in flags])
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = ids.where(is_target, NO_TARGET)
    return Blocks(input_ids, labels, attention_mask)


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # not verbose: a text longer than the model reads is cut later, no reason for a warning
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _following_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text that follows another one.

    A tokenizer of the SentencePiece kind puts a space before whatever it is given. Behind a line break it does not, so
    the text is tokenised there and the line break taken off again.
    """
    ids = _ids(text, tokenizer)
    if not ids or not str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("\u2581"):
        return ids
    anchor, anchored = _ids("\n", tokenizer), _ids("\n" + text, tokenizer)
    return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else ids


def _encode_messages(example: Example, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    messages = [{"role": role, "content": content} for role, content in example.messages]
    whole = _render(messages, tokenizer)
    ids: list[int] = []
    is_target: list[bool] = []
    position = 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, end = _turn_span(messages, turn, whole, position, tokenizer)
        for text, learned in ((whole[position:start], False), (whole[start:end], True)):
            piece = _following_ids(text, tokenizer) if ids else _ids(text, tokenizer)
            ids += piece
            is_target += [learned] * len(piece)
        position = end
    return ids, is_target


def _turn_span(
    messages: list[dict[str, str]], turn: int, whole: str, position: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """Where in the rendered conversation the assistant's turn begins and ends, its end token included.

    By the lengths of the conversation rendered up to the turn and through it. Some templates render a turn differently
    once others follow (Qwen3 drops the thinking), then its content is looked for instead.
    """
    before = _render(messages[:turn], tokenizer, add_generation_prompt=True) if turn else None
    through = _render(messages[: turn + 1], tokenizer)
    begins = len(before) if before and whole.startswith(before) else None
    if before and begins is not None and whole.startswith(through) and through.startswith(before):
        return begins, len(through)
    content = messages[turn]["content"].strip()
    found = whole.find(content, position if begins is None else begins)
    if found < 0:
        raise InputError(
            "The chat template leaves out a turn of the assistant.",
            cause=f"not found in the rendered conversation: {content[:60]!r}",
            fix="write the data as prompt and completion",
        )
    end_token = str(tokenizer.eos_token or "")
    end = found + len(content)
    return begins or found, end + len(end_token) * whole.startswith(end_token, end)


def _render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    import jinja2

    if not tokenizer.chat_template:
        raise InputError(
            "The tokenizer of the base model has no chat template, and the data has conversations.",
            fix="write the data as prompt and completion, or take an instruct version of the base model",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except jinja2.TemplateError as error:
        raise InputError("The chat template cannot render a conversation.", cause=str(error)) from error
