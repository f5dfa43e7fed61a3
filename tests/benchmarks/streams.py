"""Streams of domains and their test sets, the same for every method.

A   medicine, legal, finance, math        running text
B   the ten domains of CLINC150           an utterance and its intent as text, one of 15 per domain
C   medquad, cuad, banking, gsm8k         questions of four kinds and their answers

Every method trains on the rows that `registry add-domain` would train on: those of the training file that are not held
out by the hash of their content.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorary.domains.data.corpus import read_examples
from lorary.domains.data.documents import split_documents
from lorary.domains.data.example import Example
from lorary.registry.measure.held_out import HELD_OUT, general_examples

TEXT = {name: f"{name}/lm" for name in ("medicine", "legal", "finance", "math")}
INTENTS = {
    name: f"clinc150/{name}"
    for name in (
        "banking",
        "credit_cards",
        "kitchen_and_dining",
        "home",
        "auto_and_commute",
        "travel",
        "utility",
        "work",
        "small_talk",
        "meta",
    )
}
TASKS = {
    "medquad": "medicine/medquad_qa",
    "cuad": "legal/cuad_clause_type",
    "banking": "finance/banking77",
    "gsm8k": "math/gsm8k",
}
STREAMS = {"A": TEXT, "B": INTENTS, "C": TASKS}
GENERAL_COLUMNS = ("general", "bundled")


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One domain of a stream, or general text, which is only scored."""

    name: str
    source: Path | None  # training file; None for general text
    texts: tuple[Example, ...]  # scored in bits per byte of the targets
    questions: tuple[Example, ...] = ()  # scored by accuracy

    def training_examples(self) -> list[Example]:
        """Return the rows that `add-domain` would train on."""
        assert self.source is not None
        return split_documents(list(read_examples([self.source])), HELD_OUT).train


def read_stream(
    name: str, data: Path, *, order: str, domains: int | None, max_bytes: int, questions: int
) -> list[Domain]:
    """Return the domains of a stream in training order.

    Args:
        data: Folder of the files.
        order: `forward` or `reverse`.
        domains: Number of domains, from the start of the stream; None: all.
        max_bytes: Maximum size of a domain's test text.
        questions: Maximum number of a domain's test questions.
    """
    chosen = list(STREAMS[name].items())[:domains]
    found = [_read_domain(domain, data, path, max_bytes=max_bytes, questions=questions) for domain, path in chosen]
    return found[::-1] if order == "reverse" else found


def general_columns(data: Path, *, max_bytes: int) -> list[Domain]:
    """Return general text: from the base's pretraining source, and the held-out part of the bundled corpus."""
    texts = _spread(list(read_examples([data / "general" / "lm.test.jsonl"])), max_bytes)
    bundled = _spread(general_examples(), max_bytes)
    return [
        Domain(name=name, source=None, texts=tuple(examples))
        for name, examples in zip(GENERAL_COLUMNS, (texts, bundled), strict=True)
    ]


def _read_domain(name: str, data: Path, path: str, *, max_bytes: int, questions: int) -> Domain:
    test = list(read_examples([data / f"{path}.test.jsonl"]))
    labels = data / f"{path}.labels.json"
    asked = [example for example in test if example.choices]
    if labels.is_file() and not asked:
        choices = tuple(json.loads(labels.read_text(encoding="utf-8")))
        asked = [replace(example, choices=choices) for example in test]
    step = max(1, len(asked) // questions) if questions else 1
    return Domain(
        name=name,
        source=data / f"{path}.train.jsonl",
        texts=tuple(_spread(test, max_bytes)),
        questions=tuple(asked[::step][:questions]),
    )


def _spread(examples: Sequence[Example], max_bytes: int) -> list[Example]:
    """Return evenly spaced examples with about `max_bytes` bytes of text."""
    total = sum(len(example.text.encode()) for example in examples)
    step = max(1, round(total / max_bytes))
    return list(examples[::step])
