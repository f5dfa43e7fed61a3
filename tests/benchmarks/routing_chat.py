"""Routing of chats: questions written for this benchmark, with the base's chat template around them and without."""

import random
from pathlib import Path
from typing import Any

import product_router as product
from routing_switch import FORMS, ends
from routing_texts import EVERYDAY, FIELDS, own_questions, training_text

from lorary.domains.data.corpus import read_examples
from lorary.domains.data.example import Example
from lorary.registry.base.load import LoadedBase

CONVERSATIONS = 150  # that banking is learned from
BANKING = "banking"


def measure_chat(base: LoadedBase, data: Path) -> list[dict[str, Any]]:
    """Return a row of figures for each kind of question; banking is learned from conversations, the rest from text."""
    has_template = bool(base.tokenizer.chat_template)
    parts = [product.measure_field(base, field, training_text(data, field)) for field in FIELDS]
    parts.append(product.measure(base, _banking(data, as_chat=has_template)))
    router = product.compose(parts, base.layout.width, base.roles)
    slots = {EVERYDAY: 0, **{field: i for i, field in enumerate(FIELDS) if i}, BANKING: len(FIELDS)}
    rows = []
    for form in FORMS if has_template else FORMS[:1]:
        for name, texts in own_questions().items():
            ids = [product.question_ids(base, text, raw=form == "plain") for text in texts]
            gates = product.end_gates(router, [product.read(base, row) for row in ids])
            taken = gates.argmax(1).bincount(minlength=len(slots)).tolist()
            to = ", ".join(f"{slot} {taken[i]}" for slot, i in slots.items() if taken[i])
            rows.append({"questions": name, "as": form} | ends(gates, slots[name]) | {"taken by": to})
    return rows


def _banking(data: Path, *, as_chat: bool) -> list[Example]:
    """Return questions of customers and their intents, as conversations or as rows with a prompt."""
    examples = list(read_examples([data / "finance" / "banking77.train.jsonl"]))
    chosen = random.Random(0).sample(examples, min(CONVERSATIONS, len(examples)))
    return [_conversation(example) for example in chosen] if as_chat else chosen


def _conversation(example: Example) -> Example:
    question = example.prompt.removeprefix("Customer: ").removesuffix("\nIntent:")
    return Example(messages=(("user", question), ("assistant", example.completion)))
