"""Tokenize examples, and pack them into blocks of equal length for training.

`encode` returns the ids of an example and marks its target tokens; `pack_blocks` splits and packs encoded examples.
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

    A text is encoded as the tokenizer's prefix (usually the begin token), the text, and the end token, if there is one.
    All but the prefix are targets. With a prompt, only completion and end token are targets; prompt and completion are
    tokenized separately, so that the boundary is the same as in generation. A conversation is rendered by the chat
    template; the assistant's turns, including their end tokens, are targets.

    Raises:
        InputError: The tokenizer has no chat template, or it cannot render the conversation.
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
    """Return the tokens that the tokenizer adds before a text: usually its begin token, or none."""
    whole, plain = tokenizer("a")["input_ids"], _ids("a", tokenizer)
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    return whole[: starts[0]] if starts else []


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the end token, or an empty list if the tokenizer has none."""
    token: Any = tokenizer.eos_token_id
    return [] if token is None else [token]


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


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # not verbose: texts longer than the context window are split later, without a warning
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _following_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a text that follows another one.

    SentencePiece tokenizers add a space before a text, but not after a line break: so the text is tokenized after a
    line break, which is then removed.
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
    """Return start and end of an assistant turn in the rendered conversation, end token included.

    Found by rendering the conversation up to the turn and including it. Some templates render a turn differently if
    others follow (Qwen3 drops the thinking); then the content of the turn is searched for.
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
            "The chat template leaves out an assistant turn.",
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
            fix="write the data as prompt and completion, or use an instruct version of the base model",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except jinja2.TemplateError as error:
        raise InputError("The chat template cannot render a conversation.", cause=str(error)) from error
