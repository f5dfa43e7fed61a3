"""Routing of CLINC150's ten domains: short questions of kindred fields, with KP's slot, and other methods' routers."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import product_router as product
import torch
from peer_routers import (
    ANALYTIC_LAYER,
    REGULARISATIONS,
    AnalyticRouter,
    JointRegression,
    NearestTasks,
    embedder,
    mean_hidden,
)
from product_router import Reading
from routing_switch import FORMS
from routing_texts import training_text
from streams import INTENTS
from torch import Tensor

from lorary.adapters.composition import GENERAL
from lorary.domains.data.corpus import read_examples
from lorary.domains.data.example import Example
from lorary.registry.base.load import LoadedBase

FEW = (25, 50)  # rows of a small domain
DRAWS = 3
TASK_ROWS = 100  # that embed a task
STRENGTHS = (1.0, 10.0, 100.0)  # of the joint regression, chosen on validation rows
GENERAL_TOKENS = 24  # of a general row for the other methods: as long as a prompt here


@dataclass(frozen=True)
class Prompts:
    """Prompts of all domains, and the slot of each; KP is slot 0."""

    ids: list[list[int]]
    slots: Tensor
    readings: list[Reading]


def measure_clinc(base: LoadedBase, data: Path, encoder: Path | None) -> list[dict[str, Any]]:
    """Return a row of figures for each router and number of rows."""
    names = [name for name, path in INTENTS.items() if (data / f"{path}.train.jsonl").is_file()]
    kp = product.measure_field(base, GENERAL, training_text(data, GENERAL))
    rows = []
    for form in FORMS if base.tokenizer.chat_template else FORMS[:1]:
        train = {name: _rows(data, name, "train", form) for name in names}
        test = _prompts(base, [_rows(data, name, "test", form) for name in names])
        rows.append(_line(f"ours, {form}", None, _ours(base, kp, train, test), test))
    train = {name: _rows(data, name, "train") for name in names}
    test = _prompts(base, [_rows(data, name, "test") for name in names])
    for count in FEW:
        found = [
            _line("ours, plain", count, _ours(base, kp, _sample(train, count, seed), test), test)
            for seed in range(DRAWS)
        ]
        rows.append(_mean_line(found))
    general = _general_rows(base, data, max(len(examples) for examples in train.values()))
    fitted = _with_general(base, _prompts(base, list(train.values())), general)
    checked = _prompts(base, [_rows(data, name, "validation") for name in names])
    rows += _peers(base, encoder, fitted, checked, test)
    return rows


def _ours(base: LoadedBase, kp: Any, train: dict[str, list[Example]], test: Prompts) -> Tensor:
    parts = [kp, *(product.measure(base, examples) for examples in train.values())]
    return product.end_gates(product.compose(parts, base.layout.width, base.roles), test.readings)


def _peers(
    base: LoadedBase, encoder: Path | None, train: Prompts, checked: Prompts, test: Prompts
) -> list[dict[str, Any]]:
    """Return the figures of other routers, which get the same rows, and general text as one more class."""
    found = [_line("joint logistic regression", None, _joint(base, train, checked, test), test)]
    means = {id(part): mean_hidden(base, part.ids, ANALYTIC_LAYER) for part in (train, checked, test)}
    routers = [AnalyticRouter.fit(means[id(train)], train.slots, regularisation=r) for r in REGULARISATIONS]
    best = max(routers, key=lambda router: _right(router.shares(means[id(checked)]), checked))
    found.append(_line("Any-SSR", None, best.shares(means[id(test)]), test))
    few = _few_of_each(train, TASK_ROWS)
    for label, folder in {"LORAUTER, the base's embedding": None, "LORAUTER, sentence encoder": encoder}.items():
        if folder is None and "encoder" in label:
            continue
        embed = embedder(base, folder)
        nearest = NearestTasks.fit(embed([train.ids[i] for i in few]), train.slots[few])
        found.append(_line(label, None, nearest.shares(embed(test.ids)), test))
    return found


def _joint(base: LoadedBase, train: Prompts, checked: Prompts, test: Prompts) -> Tensor:
    vocabulary = base.model.config.get_text_config().vocab_size
    fits = [
        JointRegression.fit(train.readings, train.slots.tolist(), vocabulary=vocabulary, strength=strength)
        for strength in STRENGTHS
    ]
    best = max(fits, key=lambda fit: _right(fit.shares(checked.readings), checked))
    return best.shares(test.readings)


def _right(shares: Tensor, prompts: Prompts) -> float:
    return (shares.argmax(1) == prompts.slots).float().mean().item()


def _line(router: str, rows: int | None, shares: Tensor, test: Prompts) -> dict[str, Any]:
    own = shares.gather(1, test.slots[:, None])
    return {
        "router": router,
        "rows a domain": rows or "all",
        "prompts": len(test.ids),
        "right slot": _right(shares, test),
        "mean gate": own.mean().item(),
        "to KP": (shares.argmax(1) == 0).float().mean().item(),
    }


def _mean_line(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return lines[0] | {key: fmean(line[key] for line in lines) for key in ("right slot", "mean gate", "to KP")}


def _rows(data: Path, name: str, split: str, form: str = FORMS[0]) -> list[Example]:
    """Return rows as plain text, or as turns of the chat template, which is how they are learned by default."""
    examples = read_examples([data / f"{INTENTS[name]}.{split}.jsonl"])
    return [replace(example, raw=form == "plain") for example in examples]


def _sample(train: dict[str, list[Example]], count: int, seed: int) -> dict[str, list[Example]]:
    return {
        name: random.Random(f"{name} {seed}").sample(examples, min(count, len(examples)))
        for name, examples in train.items()
    }


def _prompts(base: LoadedBase, domains: Sequence[list[Example]]) -> Prompts:
    ids = [product.prompt_ids(base, example) for examples in domains for example in examples]
    slots = [i for i, examples in enumerate(domains, 1) for _ in examples]
    return Prompts(ids, torch.tensor(slots), [product.read(base, row) for row in ids])


def _general_rows(base: LoadedBase, data: Path, count: int) -> list[list[int]]:
    """Return pieces of general text as long as prompts, evenly spaced."""
    pieces = []
    for example in training_text(data, GENERAL):
        ids = product.text_ids(base, example.text)
        pieces += [ids[first : first + GENERAL_TOKENS] for first in range(0, len(ids), GENERAL_TOKENS)]
    return pieces[:: max(1, len(pieces) // count)][:count]


def _with_general(base: LoadedBase, prompts: Prompts, general: list[list[int]]) -> Prompts:
    slots = torch.cat([torch.zeros(len(general), dtype=torch.int64), prompts.slots])
    return Prompts(general + prompts.ids, slots, [product.read(base, row) for row in general] + prompts.readings)


def _few_of_each(train: Prompts, count: int) -> list[int]:
    """Return the indices of the first rows of each slot, in random order."""
    order = random.Random(0).sample(range(len(train.ids)), len(train.ids))
    return [
        i for slot in range(int(train.slots.max()) + 1) for i in [j for j in order if train.slots[j] == slot][:count]
    ]
