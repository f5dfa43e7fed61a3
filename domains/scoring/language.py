"""Scores on held-out text: bits per byte. Questions with choices are in choices.py.

The model is any causal language model of transformers, called as `model(input_ids=..., attention_mask=...).logits`. It
stays on its device and is read in evaluation mode; afterwards each of its modules is in the mode it was in.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..data.blocks import begin_ids, encode, end_ids
from ..data.corpus import first_within
from ..data.example import Example
from ..errors import InputError
from ..statistics.intervals import DRAWS, percentile_interval, ratio_draws

# the texts that the rows of a batch belong to, and which positions predicted a counted token: (rows, length)
OnBatch = Callable[[Sequence[int], Bool[Tensor, "rows length"]], None]


@dataclass(frozen=True, kw_only=True)
class LanguageScore:
    """How well a model predicts text; lower is better."""

    bits_per_byte: float  # nats / ln 2 / bytes
    nats: float  # negative log likelihood of all counted tokens
    bytes: int  # UTF-8 bytes of the target text
    tokens: int  # counted tokens
    texts: int  # examples
    text_nats: tuple[float, ...]  # of each example, in the given order
    text_bytes: tuple[int, ...]


@dataclass(frozen=True)
class _Window:
    """Tokens that are read in one go, and which of them count for which text."""

    text: int
    ids: list[int]
    counts: list[bool]


def score_language(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Example],
    *,
    block: int = 256,
    batch: int = 8,
    max_bytes: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_batch: OnBatch | None = None,
) -> LanguageScore:
    """Bits per UTF-8 byte of the target text: total nats / ln 2 / total bytes.

    Counted are the target tokens of `encode` (all of a text, the completion after a prompt, the assistant's turns) but
    for begin and end tokens, and the bytes of the same text; a space put between prompt and completion belongs to its
    first token and is not counted as a byte. Each example is read from its beginning in consecutive windows of at most
    `block` tokens. Each window begins with what the tokenizer puts before a text, else its begin token, else its end
    token; if it has none of them, the first token of each window is not counted although its bytes are.

    Log-probabilities are computed in float32 and added up in float64. Batch size and padding change nothing but the
    order of float32 additions inside the model.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        examples: Held-out examples.
        block: Tokens of a window, its beginning included.
        batch: Windows that are read at once.
        max_bytes: Only the first examples are read whose bytes together stay within this; at least one is.
        on_progress: Told how many windows are done, of how many.
        on_batch: Called after each forward pass of the model, while whatever it left behind can still be read.

    Raises:
        InputError: There is nothing to score.
    """
    chosen = first_within(examples, max_bytes)
    windows = [window for i, example in enumerate(chosen) for window in _windows(example, i, tokenizer, block)]
    nats = [0.0] * len(chosen)
    for window, value in _window_nats(model, windows, batch, on_progress, on_batch):
        nats[window.text] += value
    text_bytes = [example.target_bytes for example in chosen]
    if not windows or not sum(text_bytes):
        raise InputError("There is no held-out text to score.", fix="give more data")
    return LanguageScore(
        bits_per_byte=sum(nats) / math.log(2) / sum(text_bytes),
        nats=sum(nats),
        bytes=sum(text_bytes),
        tokens=sum(sum(window.counts[1:]) for window in windows),
        texts=len(chosen),
        text_nats=tuple(nats),
        text_bytes=tuple(text_bytes),
    )


def confidence_interval(score: LanguageScore, *, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of bits per byte, by the percentile bootstrap over texts."""
    ratios = ratio_draws([score.text_nats], score.text_bytes, draws=draws, seed=seed)
    interval = percentile_interval(ratios / math.log(2))
    assert interval is not None
    return interval


def _windows(example: Example, text: int, tokenizer: PreTrainedTokenizerBase, block: int) -> Iterator[_Window]:
    """The windows of an example in which something counts."""
    start = start_ids(tokenizer)
    room = block - len(start)
    if room < 1:
        raise ValueError(f"block is {block}, expected more than {len(start)}")
    ids, is_target = encode(example, tokenizer)
    skipped = len(start) if ids[: len(start)] == start else 0
    uncounted = {*start, *_bos_ids(tokenizer), *end_ids(tokenizer)}
    counts = [flag and token not in uncounted for token, flag in zip(ids, is_target, strict=True)]
    for first in range(skipped, len(ids), room):
        if any(counts[first : first + room]):
            yield _Window(text, start + ids[first : first + room], [False] * len(start) + counts[first : first + room])


def start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a window begins with: what the tokenizer puts before a text, else its begin token, else its end token."""
    return begin_ids(tokenizer) or _bos_ids(tokenizer) or end_ids(tokenizer)


def _bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    token: Any = tokenizer.bos_token_id
    return [] if token is None else [token]


def _window_nats(
    model: nn.Module,
    windows: Sequence[_Window],
    batch: int,
    on_progress: Callable[[int, int], None] | None,
    on_batch: OnBatch | None,
) -> Iterator[tuple[_Window, float]]:
    """Each window with the nats of its counted tokens; longest first, so that too big a batch fails at once."""
    by_length = sorted(windows, key=lambda window: -len(window.ids))
    for first in range(0, len(by_length), batch):
        rows = by_length[first : first + batch]
        with evaluation_mode(model), torch.inference_mode():
            nats = _batch_nats(model, rows)
            if on_batch:
                # position t predicts token t + 1
                predicts = padded([row.counts[1:] for row in rows]).bool()
                on_batch([row.text for row in rows], predicts)
        yield from zip(rows, nats, strict=True)
        if on_progress:
            on_progress(first + len(rows), len(by_length))


def _batch_nats(model: nn.Module, rows: Sequence[_Window]) -> list[float]:
    device = next(model.parameters()).device
    ids, counts = padded([row.ids for row in rows]), padded([row.counts for row in rows]).bool()
    mask = padded([[1] * len(row.ids) for row in rows])
    # what comes before the first token that counts is given, so it may be read as a whole
    with reading_prompts(model, [row.counts.index(True) for row in rows]):
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    counted = counts[:, 1:]
    picked = logits[:, :-1][counted.to(logits.device)].float()
    nats = F.cross_entropy(picked, ids[:, 1:][counted].to(picked.device), reduction="none").cpu().double()
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, counted.nonzero()[:, 0], nats).tolist()


def reading_prompts(model: nn.Module, lengths: Sequence[int]) -> AbstractContextManager[None]:
    """Lets a model that can read prompts as a whole do so: a composed model, whose slot gates are causal otherwise.

    Args:
        model: Any model.
        lengths: Positions of each row's prompt.
    """
    reader = getattr(model, "reading_prompts", None)
    return nullcontext() if reader is None else reader(lengths)


def padded(rows: Sequence[Sequence[int]]) -> Int64[Tensor, "rows length"]:
    """Rows of different lengths as one tensor, zeros behind."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """While it is open, every module is in evaluation mode; afterwards each is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
