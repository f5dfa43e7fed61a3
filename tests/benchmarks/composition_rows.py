"""Ablations of a composition: the domains of a stored registry composed in other ways, without training.

    token+pair+hidden   the default: routed by all three kinds of evidence
    token, pair+hidden  etc.: routed by these kinds only
    no-kp-bank          the KP slot has an untrained bank without effect
    no-kp               the KP slot has a prior of 0, so the domains share all text
    known               the domain of the text is given (KP for general text); expert and rank gates as usual
    static-known        the same with expert and rank gates constant at their means
    static-experts      routed slots; expert and rank gates constant at their means
    static-equal        all gates constant, with equal slots, as in soft merging

`known` is the oracle that defines the share of the oracle's gain.
"""

import argparse
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from method import Scored, digest
from ours import code_version
from scores import Cell, ScoreBook
from streams import Domain, general_columns, read_stream
from torch import Tensor
from transformers import PreTrainedModel

from lorary.adapters.bank import new_bank
from lorary.adapters.composition import GENERAL
from lorary.adapters.config import BankConfig
from lorary.adapters.layer.attach import attach
from lorary.adapters.layer.stack import Stack
from lorary.adapters.router.router import DomainRouter
from lorary.registry import Registry
from lorary.registry.base.load import LoadedBase
from lorary.registry.compose.build import base_router, read_packs
from lorary.registry.compose.plan import Plan
from lorary.registry.pack.pack import DomainPack

TERMS = {"token": ("token_evidence",), "pair": ("pair_evidence",), "hidden": ("rows", "bias")}  # the router's buffers
ROUTED = tuple("+".join(terms) for count in (3, 2, 1) for terms in combinations(TERMS, count))
WITHOUT_KP = ("no-kp-bank", "no-kp")
CONSTANT_SLOTS = ("known", "static-known", "static-equal")
COMPOSITIONS = (*ROUTED, *WITHOUT_KP, "static-experts", *CONSTANT_SLOTS)


def measure_composition(arguments: argparse.Namespace, row: str) -> dict[str, Any]:
    """Compose all domains of a stream that the registry has and score each of them and general text."""
    registry = Registry.open(arguments.store)
    stream = read_stream(
        arguments.stream,
        arguments.data,
        order="forward",
        domains=None,
        max_bytes=arguments.max_bytes,
        questions=arguments.questions,
    )
    domains = [domain for domain in stream if registry.store.versions(domain.name)]
    plan = registry.plan("+".join(domain.name for domain in domains))
    packs = read_packs(registry.store, plan)
    book = ScoreBook(arguments.out / "scores.jsonl", registry.base.tokenizer)
    origin = f"{digest([slot.manifest.digest for slot in plan.slots])} {code_version()}"

    def cell(name: str, column: Domain) -> Cell:
        about = f"{name} for {column.name}" if name.endswith("known") else name
        scored = Scored(f"{origin} {about}", lambda: composed(name, column.name, plan, packs, registry.base))
        return book.cell(scored, column, with_questions=True)

    bare = Scored("base", lambda: registry.base.model)
    line: dict[str, Any] = {"domains": [domain.name for domain in domains], "share": {}, "general": {}, "right": {}}
    for domain in domains:
        before = book.cell(bare, domain, with_questions=False)
        here, known = cell(row, domain), cell("known", domain)
        line["share"][domain.name] = (before["bits"] - here["bits"]) / (before["bits"] - known["bits"])
        if domain.questions:
            line["right"][domain.name] = [round(found["accuracy"] * found["asked"]) for found in (here, known)]
    for column in general_columns(arguments.data, max_bytes=arguments.max_bytes):
        before = book.cell(bare, column, with_questions=False)
        line["general"][column.name] = cell(row, column)["bits"] / before["bits"] - 1
    return line


def composed(row: str, column: str, plan: Plan, packs: list[DomainPack], base: LoadedBase) -> PreTrainedModel:
    """Return the composition of one row.

    Args:
        column: The domain of the text to score, for rows in which it is known.
    """
    names = tuple(slot.name for slot in plan.slots)
    banks = [pack.bank for pack in packs]
    if row == "no-kp-bank":
        banks[0] = new_bank(base.model, base.layout, BankConfig(), generator=torch.Generator().manual_seed(0))
    stack = Stack(names=names, banks=tuple(banks), static=row.startswith("static"))
    if row in CONSTANT_SLOTS:
        return attach(base.model, stack, router=None, fixed=constant_slots(row, column, names))
    prior = torch.tensor([slot.prior for slot in plan.slots])
    if row == "no-kp":
        prior[0] = 0.0
    router = base_router(packs, prior, base)
    if row in ROUTED:
        keep_terms(router, row.split("+"))
    return attach(base.model, stack, router=router)


def constant_slots(row: str, column: str, names: tuple[str, ...]) -> Float[Tensor, " slots"]:
    """Return slot gates that do not depend on the text."""
    if row == "static-equal":
        open_slots = [name for name in names if name != GENERAL]
    else:
        open_slots = [column if column in names else GENERAL]
    return torch.tensor([float(name in open_slots) / len(open_slots) for name in names])


def keep_terms(router: DomainRouter, terms: list[str]) -> None:
    """Remove all other kinds of evidence from a router."""
    for term, buffers in TERMS.items():
        if term not in terms:
            for name in buffers:
                router.get_buffer(name).zero_()
