"""Texts that routing.py measures on: general text, fields of running text, and prompts of several kinds."""

import json
import random
import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from product_router import text_ids

from lorary.adapters.composition import GENERAL
from lorary.domains.data.catalog import builtin_domains
from lorary.domains.data.corpus import read_examples
from lorary.domains.data.example import Example
from lorary.registry.base.load import LoadedBase

FIELDS = (GENERAL, "medicine", "legal")
TRAINING_BYTES = 400_000  # about, of a field's text, for its statistics
QUESTIONS = Path(__file__).with_name("questions.jsonl")
EVERYDAY = "everyday"  # questions that belong to KP


def training_text(data: Path, field: str) -> list[Example]:
    """Return training text of a field; that of KP is general text, and the bundled corpus with its questions."""
    whole = list(read_examples([data / field / "lm.train.jsonl"]))
    size = sum(example.target_bytes for example in whole)
    examples = whole[:: max(1, round(size / TRAINING_BYTES))]  # files are sorted by source
    if field != GENERAL:
        return examples
    bundled = builtin_domains()[GENERAL]
    assert bundled.corpus is not None
    assert bundled.questions is not None
    return [*examples, *read_examples([bundled.corpus, bundled.questions])]


def unseen_text(data: Path, field: str) -> list[str]:
    """Return the documents of a field that no statistics hold: those of its validation and test files."""
    found = [data / field / f"lm.{split}.jsonl" for split in ("validation", "test")]
    return [example.text for example in read_examples([path for path in found if path.is_file()])]


def stream_ids(base: LoadedBase, texts: Sequence[str], length: int, seed: int) -> list[int]:
    """Return that many tokens of documents in random order, from the start of the first; repeated if they run out."""
    ids: list[int] = []
    for text in cycle(random.Random(seed).sample(texts, len(texts))):
        ids += text_ids(base, text)
        if len(ids) >= length:
            break
    return ids[:length]


def own_questions() -> dict[str, list[str]]:
    """Return the questions that were written for this benchmark, by domain; `everyday` belongs to KP."""
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["domain"], []).append(row["text"])
    return found


def sentences(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Return consecutive sentences of a random document, each of 40 to 400 characters."""
    rng = random.Random(seed)
    while True:
        text = rng.choice(texts)
        found = [s.strip() for s in re.split(r"(?<=[.?!])\s+", text)]
        found = [sentence for sentence in found if 40 <= len(sentence) <= 400]
        if len(found) >= count:
            first = rng.randrange(len(found) - count + 1)
            return found[first : first + count]
