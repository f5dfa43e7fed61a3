"""Tokenize examples, and pack them into blocks of equal length for training.

`encode` returns the ids of an example and marks its target tokens; `pack_blocks` splits and packs encoded examples.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from .chat import Span, learned_spans
from .example import Example
from .frame import end_ids, ends_text, following_ids, frame_of, text_ids
from .prompt import AS_TEXT, as_conversation, is_chat

NO_TARGET = -100  # ignore_index of PyTorch's cross entropy
MIN_TARGETS = 64  # tokens

Encoded = tuple[list[int], list[bool]]  # token ids, and whether each is a target


@dataclass(frozen=True)
class Blocks:
    """Packed token ids, labels and attention mask; padding is on the right, with id 0, label -100 and mask 0."""

    input_ids: Int64[Tensor, "blocks block"]
    labels: Int64[Tensor, "blocks block"]  # input_ids where a token is a target, else -100; not shifted
    attention_mask: Int64[Tensor, "blocks block"]


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Return the token ids of an example, and which of them are targets.

    A conversation is rendered by the chat template; the assistant's turns, including their end tokens, are targets. A
    prompt with its completion is a conversation of two turns if the tokenizer has a chat template and the example is
    not `raw`.

    A text is encoded as the tokenizer's prefix (usually the begin token), the text, and the end token, if there is one.
    All but the prefix are targets. With a prompt that is not rendered, only completion and end token are targets;
    prompt and completion are tokenized separately, so that the boundary is the same as in generation. A text that
    begins with the begin token or with a token of the chat template is rendered already: it gets no second prefix, and
    where it ends with the end token, no second one.

    Raises:
        CorpusError: The chat template cannot render the conversation, ignores a field of it, or an assistant's turn
            cannot be told from the rest; an InputError if the example has no source.
        InputError: The tokenizer has no chat template.
    """
    if example.messages:
        return _encode_spans(*learned_spans(example, tokenizer), tokenizer)
    if is_chat(example.prompt, tokenizer, raw=example.raw):
        return _encode_spans(*learned_spans(as_conversation(example), tokenizer, fix=AS_TEXT), tokenizer)
    before, learned = text_ids(example.prompt, tokenizer), text_ids(example.completion, tokenizer)
    frame = frame_of(example.prompt or example.completion, before or learned, tokenizer)
    if example.prompt:
        # what follows a token of the template is not joined to it by a space
        text = example.completion if before and before[-1] in frame.control else example.continuation
        learned = following_ids(text, tokenizer)
    if not before and learned[: len(frame.bos)] == frame.bos:
        before, learned = learned[: len(frame.bos)], learned[len(frame.bos) :]
    elif before[: len(frame.bos)] != frame.bos:
        before = frame.bos + before
    if not ends_text(learned, frame.ends, tokenizer):
        learned = learned + end_ids(tokenizer)
    return before + learned, [False] * len(before) + [True] * len(learned)


def pack_blocks(encoded: Iterable[Encoded], block: int, *, min_targets: int = MIN_TARGETS) -> Blocks:
    """Pack encoded examples into rows of `block` tokens; every target token occurs exactly once.

    An example longer than a block is split starting from its end, so that a completion keeps as much of its prompt as
    fits; pieces without targets are dropped. Pieces are packed by best fit decreasing, and ordered as the examples are,
    within and between blocks. Pieces in one block attend to each other. The label of the first token of a block does
    not count in the usual shifted loss.

    Raises:
        InputError: There are fewer than `min_targets` targets.
    """
    if block < 2:
        raise ValueError(f"block is {block}, expected at least 2")
    pieces = [piece for ids, is_target in encoded for piece in _split(ids, is_target, block) if any(piece[1])]
    targets = sum(sum(is_target) for _, is_target in pieces)
    if targets < max(min_targets, 1):
        raise InputError(
            f"The data has {targets} tokens to learn from; at least {max(min_targets, 1)} are needed.",
            fix="give more text: a domain needs about ten thousand words",
        )
    groups = _best_fit([len(ids) for ids, _ in pieces], block)
    return _fill([[pieces[i] for i in group] for group in groups], block)


def _split(ids: list[int], is_target: list[bool], block: int) -> list[Encoded]:
    first = len(ids) % block
    bounds = [0, *range(first or block, len(ids) + 1, block)]
    return [(ids[a:b], is_target[a:b]) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]


def _best_fit(lengths: Sequence[int], block: int) -> list[list[int]]:
    """Assign pieces to blocks by best fit decreasing; return the indices of the pieces of each block."""
    groups: list[list[int]] = []
    sizes: list[int] = []  # free tokens of open groups: sorted, without duplicates
    groups_with: dict[int, list[int]] = {}  # free tokens -> groups
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect_left(sizes, lengths[piece])
        if place == len(sizes):
            free, group = block, len(groups)
            groups.append([])
        else:
            free = sizes[place]
            group = groups_with[free].pop()
            if not groups_with[free]:
                del groups_with[sizes.pop(place)]
        groups[group].append(piece)
        if remaining := free - lengths[piece]:
            if remaining not in groups_with:
                insort(sizes, remaining)
            groups_with.setdefault(remaining, []).append(group)
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


def _encode_spans(whole: str, spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Tokenize a rendered text, span by span, so that the boundaries are the same as in generation."""
    ids: list[int] = []
    is_target: list[bool] = []
    position = 0
    for start, end in spans:
        for text, learned in ((whole[position:start], False), (whole[start:end], True)):
            piece = following_ids(text, tokenizer) if ids else text_ids(text, tokenizer)
            ids += piece
            is_target += [learned] * len(piece)
        position = end
    return ids, is_target
