"""Roles of tokens in routing: those that carry no evidence, those that end a sentence or a line, and common ones.

The tokens of a chat template (markers, roles, the default system prompt) and special tokens say nothing about a field.
They enter no statistics and no evidence, so that a text is routed alike with the template around it and without.

Common tokens ("the", "how", a comma) say little, and most of a short question is made of them. In the mean of a text's
features each token weighs a / (a + p), where p is its share of ordinary text (smooth inverse frequency; Arora, Liang
and Ma 2017, "A simple but tough-to-beat baseline for sentence embeddings").
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..data.catalog import ORDINARY_TEXT
from ..data.chat import TEMPLATE_ERRORS
from ..data.corpus import read_examples
from ..data.example import Example
from ..data.frame import text_ids
from .hashing import PAIR_BUCKETS, pair_buckets

_CONTENT = "Qxv7kwz"  # stands for what people write; templates have no such text
_DATES = (
    *(datetime(2024, month, 1) for month in range(1, 13)),  # noqa: DTZ001
    *(datetime(2024, 1, day) for day in range(1, 32)),  # noqa: DTZ001
    *(datetime(year, 1, 1) for year in range(2020, 2041)),  # noqa: DTZ001
)
# transformers hands data to templates, but no functions, so its clock is replaced by a macro
_CLOCK = (
    "{% macro strftime_now(format) %}{% set written = namespace(date=format) %}"
    "{% for directive, value in directives.items() %}"
    "{% set written.date = written.date | replace(directive, value) %}{% endfor %}{{ written.date }}{% endmacro %}"
    "{{ '' }}"  # a line feed after a block would be dropped, and the template may begin with one
)
# as tokenizers write them: space is Ġ or ▁, line feed Ċ or <0x0A>, and the bytes of 。？！ each a letter
_SENTENCE = re.compile(r"[\sĠ▁]*[.?!]+[\"'”’)\]]*[\sĠ▁]*")
_LINE = re.compile(r"\n|Ċ|<0x0A>|[。？！]|ãĢĤ|ï¼Ł|ï¼ģ")
_OPENS = re.compile(r"[\sĠ▁Ċ]|<0x0A>")

NEUTRAL = 1  # carries no evidence
SENTENCE = 2  # ends a sentence if white space follows, as in no number or abbreviation within a word
LINE = 4  # ends a line, or a sentence of a script without spaces
OPENS = 8  # begins with white space

COMMON_SHARE = 3e-4  # a: share of ordinary text at which a token's features weigh half


@dataclass(frozen=True)
class TokenRoles:
    """Roles of all tokens of a vocabulary."""

    flags: UInt8[Tensor, " vocabulary"]  # sum of the roles of each token
    # counts of tokens and pairs in everyday requests, whose wording says nothing about a field
    requests: tuple[Int64[Tensor, " vocabulary"], Int64[Tensor, " buckets"]] | None = None
    weights: Float[Tensor, " vocabulary"] | None = None  # of each token's features; None if all weigh the same

    @cached_property
    def neutral(self) -> Bool[Tensor, " vocabulary"]:
        """Which tokens carry no evidence."""
        return (self.flags & NEUTRAL) > 0


def ends_of_sentences(flags: UInt8[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Return which positions end a sentence or a line, given the roles of their tokens."""
    opens = torch.cat([flags[:, 1:] & OPENS, torch.zeros_like(flags[:, :1])], dim=1)
    return ((flags & LINE) > 0) | (((flags & SENTENCE) > 0) & (opens > 0))


def token_roles(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, template: Sequence[int] | None = None
) -> TokenRoles:
    """Return the roles of the tokens of a base model.

    Args:
        tokenizer: Its tokenizer.
        vocabulary: Its vocabulary size, which may be larger than the tokenizer's.
        template: Tokens of its chat template, if they are known.
    """
    flags = torch.zeros(vocabulary, dtype=torch.uint8)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    found = special | set(template_tokens(tokenizer) if template is None else template)
    texts = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), vocabulary))))
    for token, text in enumerate(texts):
        piece = str(text)
        if text is not None and not (piece.isascii() and piece.isalnum()):  # most tokens are
            flags[token] = (
                (SENTENCE if _SENTENCE.fullmatch(piece) else 0)
                | (LINE if _LINE.search(piece) else 0)
                | (OPENS if _OPENS.match(piece) else 0)
            )
    flags[[token for token in sorted(found) if token < vocabulary]] |= NEUTRAL
    counts = [_count(read_examples([file]), tokenizer, flags) for file in ORDINARY_TEXT]
    return TokenRoles(flags, counts[0], feature_weights([tokens for tokens, _ in counts]))


def feature_weights(ordinary: Sequence[Int64[Tensor, " vocabulary"]]) -> Float[Tensor, " vocabulary"]:
    """Return the weight of each token's features, given counts in several kinds of ordinary text."""
    shares = torch.stack([counts.double() / counts.sum().clamp(min=1) for counts in ordinary]).mean(0)
    return (COMMON_SHARE / (COMMON_SHARE + shares)).float()


def _count(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase, flags: UInt8[Tensor, " vocabulary"]
) -> tuple[Int64[Tensor, " vocabulary"], Int64[Tensor, " buckets"]]:
    texts = [torch.tensor(text_ids(example.completion, tokenizer)) for example in examples]
    return count_kinds((ids[(flags[ids] & NEUTRAL) == 0] for ids in texts), len(flags))


def count_kinds(
    texts: Iterable[Int64[Tensor, " text"]], vocabulary: int
) -> tuple[Int64[Tensor, " vocabulary"], Int64[Tensor, " buckets"]]:
    """Return the counts of tokens, and of hashed pairs of tokens, in texts."""
    tokens, pairs = torch.zeros(vocabulary, dtype=torch.int64), torch.zeros(PAIR_BUCKETS, dtype=torch.int64)
    for text in texts:
        tokens += torch.bincount(text, minlength=vocabulary)
        pairs += torch.bincount(pair_buckets(text[:-1], text[1:]), minlength=PAIR_BUCKETS)
    return tokens, pairs


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that the chat template writes around the contents of messages, sorted; none without one."""
    if not tokenizer.chat_template:
        return ()
    found: set[int] = set()
    for text in _renderings(tokenizer):
        found.update(_around_content(text, tokenizer))
    return tuple(sorted(found))


def _renderings(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Render small conversations, on many dates if the template writes the date."""
    roles = ("user",), ("user", "assistant"), ("user", "assistant", "user"), ("system", "user", "assistant")
    template = tokenizer.get_chat_template()
    writes_date = "strftime_now" in template or "date_string" in template
    # only known dates: the tokens must not depend on the day on which they are found
    clocks: Sequence[dict[str, Any]] = [_clock(date) for date in _DATES] if writes_date else [{}]
    for turns in roles:
        messages = [{"role": role, "content": _CONTENT} for role in turns]
        for clock in clocks:
            for prompt in (False, True):
                try:
                    yield str(
                        tokenizer.apply_chat_template(
                            messages,
                            chat_template=_CLOCK + template if writes_date else template,
                            tokenize=False,
                            add_generation_prompt=prompt,
                            **clock,
                        )
                    )
                except TEMPLATE_ERRORS:  # many know no system message
                    continue


def _clock(date: datetime) -> dict[str, Any]:
    """Return what a template gets to write a date by `_CLOCK`."""
    known = {f"%{directive}": date.strftime(f"%{directive}") for directive in "aAbBcdfGHIjmMpSuUVwWxXyY"}
    unpadded = {f"%-{directive}": str(int(known[f"%{directive}"])) for directive in "dHIjmMSy"}
    return {"date_string": date.strftime("%d %b %Y"), "directives": {**known, **unpadded, "%e": f"{date.day:2d}"}}


def _around_content(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """Return the tokens of a rendered conversation that hold no part of a content."""
    if not tokenizer.is_fast:
        for piece in text.split(_CONTENT):
            yield from tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        return
    places = [(match.start(), match.end()) for match in re.finditer(_CONTENT, text)]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if not any(start < last and first < end for first, last in places):
            yield token
