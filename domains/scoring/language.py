"""Bits per byte on held-out text. Multiple-choice questions are scored in choices.py.

The model is any causal language model of transformers, called as `model(input_ids=..., attention_mask=...).logits`, on
its device and in evaluation mode; the training mode of each module is restored afterwards.
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base_model import max_positions
from ..data.blocks import encode
from ..data.corpus import limit_bytes
from ..data.example import Example
from ..data.frame import begin_ids, end_ids
from ..errors import IncompatibleError, InputError
from ..statistics.intervals import DRAWS, percentile_interval, ratio_draws

# index of the text of each row, and a mask of the positions that predicted a counted token
OnBatch = Callable[[Sequence[int], Bool[Tensor, "rows length"]], None]


@dataclass(frozen=True, kw_only=True)
class LanguageScore:
    """Bits per byte of a model on texts; lower is better."""

    bits_per_byte: float  # nats / ln 2 / bytes
    nats: float  # negative log likelihood of all counted tokens
    bytes: int  # UTF-8 bytes of the target text
    tokens: int  # counted tokens
    texts: int  # examples
    text_nats: tuple[float, ...]  # per example, in the given order
    text_bytes: tuple[int, ...]


@dataclass(frozen=True)
class _Window:
    """Tokens of one text in one forward pass, and which of them are counted."""

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
    """Compute bits per UTF-8 byte of the target text: total nats / ln 2 / total bytes.

    Counted are the target tokens of `encode` (of a text all, else the completion or the assistant's turns) except begin
    and end tokens, and the bytes of the same text; a space that is added between prompt and completion is part of the
    first token and not counted as a byte. Each example is read from its start in consecutive windows of at most `block`
    tokens. Each window begins with the tokenizer's prefix, else its begin token, else its end token; if there is none,
    the first token of each window is not counted although its bytes are.

    Log-probabilities are computed in float32 and summed in float64. Batch size and padding change only the order of
    float32 additions in the model.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        examples: Held-out examples.
        block: Tokens per window, including its prefix; at most the positions that the model has.
        batch: Windows per forward pass.
        max_bytes: Read only the first examples up to this total of target bytes, but at least one.
        on_progress: Called with the number of finished windows and their total.
        on_batch: Called after each forward pass, while state that the model keeps of it can still be read.

    Raises:
        InputError: There is nothing to score.
        IncompatibleError: The model computes what is not finite.
    """
    chosen = limit_bytes(examples, max_bytes)
    if isinstance(model, PreTrainedModel):
        block = min(block, max_positions(model) or block)
    windows = [window for i, example in enumerate(chosen) for window in _windows(example, i, tokenizer, block)]
    nats = [0.0] * len(chosen)
    for window, value in _window_nats(model, windows, batch, on_progress, on_batch):
        nats[window.text] += value
    text_bytes = [example.target_bytes for example in chosen]
    if not windows or not sum(text_bytes):
        raise InputError("There is no held-out text to score.", fix="give more data")
    if not math.isfinite(sum(nats)):
        unscored = sum(not math.isfinite(value) for value in nats)
        dtype = next(model.parameters()).dtype
        raise IncompatibleError(
            "The model's predictions are not numbers.",
            cause=f"the log-likelihood of {unscored} of {len(nats)} texts is not finite, in {dtype}",
            fix="compute in more digits: --dtype float32; if it stays, look for damage: registry verify --deep",
        )
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
    """Return the 95 % interval of bits per byte, by the percentile bootstrap over texts."""
    ratios = ratio_draws([score.text_nats], score.text_bytes, draws=draws, seed=seed)
    interval = percentile_interval(ratios / math.log(2))
    assert interval is not None
    return interval


def _windows(example: Example, text: int, tokenizer: PreTrainedTokenizerBase, block: int) -> Iterator[_Window]:
    """Yield the windows of an example that have a counted token."""
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
    """Return the prefix of a window: the tokenizer's prefix of a text, else its begin token, else its end token."""
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
    """Yield each window with the nats of its counted tokens; longest first, so that lack of memory shows early."""
    by_length = sorted(windows, key=lambda window: -len(window.ids))
    for first in range(0, len(by_length), batch):
        rows = by_length[first : first + batch]
        with evaluation_mode(model), torch.inference_mode():
            nats = _batch_nats(model, rows)
            if on_batch:
                # position t predicts token t + 1
                predicts = pad_rows([row.counts[1:] for row in rows]).bool()
                on_batch([row.text for row in rows], predicts)
        yield from zip(rows, nats, strict=True)
        if on_progress:
            on_progress(first + len(rows), len(by_length))


def _batch_nats(model: nn.Module, rows: Sequence[_Window]) -> list[float]:
    device = next(model.parameters()).device
    ids, counts = pad_rows([row.ids for row in rows]), pad_rows([row.counts for row in rows]).bool()
    mask = pad_rows([[1] * len(row.ids) for row in rows])
    # tokens before the first counted one are given, so they are a prompt
    with reading_prompts(model, [row.counts.index(True) for row in rows]):
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    counted = counts[:, 1:]
    picked = logits[:, :-1][counted.to(logits.device)].float()
    nats = F.cross_entropy(picked, ids[:, 1:][counted].to(picked.device), reduction="none").cpu().double()
    return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, counted.nonzero()[:, 0], nats).tolist()


def reading_prompts(model: nn.Module, lengths: Sequence[int]) -> AbstractContextManager[None]:
    """Enter `model.reading_prompts`, which composed models have: slot gates of a prompt are then not causal.

    Args:
        model: Any model.
        lengths: Prompt length of each row.
    """
    reader = getattr(model, "reading_prompts", None)
    return nullcontext() if reader is None else reader(lengths)


def pad_rows(rows: Sequence[Sequence[int]]) -> Int64[Tensor, "rows length"]:
    """Stack rows of different lengths, padded with zeros on the right."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set all modules to evaluation mode, and restore the mode of each on exit."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
