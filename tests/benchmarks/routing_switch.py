"""Routing of text that changes its field: running streams, and prompts whose question is of another field."""

import math
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from statistics import fmean, median
from typing import Any

import product_router as product
import torch
from routing_texts import FIELDS, own_questions, sentences, stream_ids, training_text, unseen_text
from torch import Tensor

from lorary.domains.statistics.intervals import percentile_interval
from lorary.registry.base.load import LoadedBase

BEFORE = (64, 512, 4096)  # tokens of another field
AFTER = 512  # positions that are judged
KEPT = 8  # positions that a domain must own in a row to have taken over
SENTENCES = 5
FORMS = ("plain", "chat")  # of a question


def measure_switch(
    base: LoadedBase, data: Path, *, streams: int, lengths: Sequence[int] = BEFORE
) -> list[dict[str, Any]]:
    """Return a row of figures for the start of each field's texts, and for each field after each other field."""
    router, texts = _router(base, data), {field: unseen_text(data, field) for field in FIELDS}
    rows = []
    for field in FIELDS:
        owned = [_owned(base, router, [], stream_ids(base, texts[field], AFTER, i), field) for i in range(streams)]
        rows.append(_line("the start", 0, field, owned))
    for length in lengths:
        found = []
        for earlier, field in permutations(FIELDS, 2):
            owned = []
            for i in range(streams):
                before = stream_ids(base, texts[earlier], length, streams + i)
                owned.append(_owned(base, router, before, stream_ids(base, texts[field], AFTER, i), field))
            found += owned
            rows.append(_line(earlier, length, field, owned))
        rows.append(_line("any other", length, "all", found))
    return rows


def measure_mixed(base: LoadedBase, data: Path) -> list[dict[str, Any]]:
    """Return the share of questions that their own slot gets after sentences of another field."""
    router, questions = _router(base, data), own_questions()
    texts = {field: unseen_text(data, field) for field in FIELDS}
    rows = []
    for earlier, field in permutations(FIELDS[1:], 2):
        contexts = ["\n".join(sentences(texts[earlier], SENTENCES, i)) for i in range(len(questions[field]))]
        prompts = [f"{context}\n\n{question}" for context, question in zip(contexts, questions[field], strict=True)]
        for form in FORMS if base.tokenizer.chat_template else FORMS[:1]:
            ids = [product.question_ids(base, prompt, raw=form == "plain") for prompt in prompts]
            gates = product.end_gates(router, [product.read(base, row) for row in ids])
            rows.append({"sentences of": earlier, "question of": field, "as": form} | ends(gates, FIELDS.index(field)))
    return rows


def ends(gates: Tensor, slot: int) -> dict[str, Any]:
    """Return the share of prompts whose largest gate is the given slot's, and its mean gate."""
    right = (gates.argmax(1) == slot).float()
    return {"prompts": len(gates), "right slot": right.mean().item(), "mean gate": gates[:, slot].mean().item()}


def taken_over(owned: Sequence[bool]) -> float:
    """Return the first position from which a domain owns `KEPT` positions in a row; infinite if there is none."""
    for start in range(len(owned) - KEPT + 1):
        if all(owned[start : start + KEPT]):
            return start
    return math.inf


def _router(base: LoadedBase, data: Path) -> Any:
    parts = [product.measure_field(base, field, training_text(data, field)) for field in FIELDS]
    return product.compose(parts, base.layout.width, base.roles)


def _owned(base: LoadedBase, router: Any, before: list[int], ids: list[int], field: str) -> list[bool]:
    """Return at which of the later positions the field's slot has the largest gate."""
    found = product.gates(router, product.read(base, before + ids))[len(before) :]
    return (found.argmax(1) == FIELDS.index(field)).tolist()


def _line(earlier: str, length: int, field: str, owned: list[list[bool]]) -> dict[str, Any]:
    shares = torch.tensor([fmean(one) for one in owned], dtype=torch.float64)
    draws = shares[torch.randint(len(shares), (1000, len(shares)), generator=torch.Generator().manual_seed(0))].mean(1)
    interval = percentile_interval(draws.tolist())
    assert interval is not None
    wait = median(taken_over(one) for one in owned)
    return {
        "after": earlier,
        "tokens": length,
        "field": field,
        "streams": len(owned),
        "owned": shares.mean().item(),
        "interval": f"{interval[0]:.3f} to {interval[1]:.3f}",
        "median wait": f"more than {AFTER}" if math.isinf(wait) else f"{wait:g}",
    }
