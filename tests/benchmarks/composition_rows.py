"""Ablations of a composition: the domains of a stored registry composed in another way, nothing trained again.

    token+pair+hidden   as lorary composes: routed by all three kinds of evidence
    token, pair+hidden  and so on: by these kinds only
    no-kp-bank          the KP slot is there, but changes nothing
    no-kp               the KP slot has no prior, so domains share all text
    known               somebody says which domain a text is of (general text is KP's); own expert and rank gates
    static-known        the same with expert and rank gates constant at their means
    static-experts      routed slots; expert and rank gates are constant
    static-equal        all gates constant, every domain alike: what soft merging folds into the weights

`known` is the oracle's choice, by which the share of its gain is measured.
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
from lorary.registry.compose.build import build_router, read_packs
from lorary.registry.compose.plan import Plan
from lorary.registry.pack.pack import DomainPack

TERMS = {"token": ("token_evidence",), "pair": ("pair_evidence",), "hidden": ("rows", "bias")}  # the router's buffers
ROUTED = tuple("+".join(terms) for count in (3, 2, 1) for terms in combinations(TERMS, count))
WITHOUT_KP = ("no-kp-bank", "no-kp")
CONSTANT_SLOTS = ("known", "static-known", "static-equal")
COMPOSITIONS = (*ROUTED, *WITHOUT_KP, "static-experts", *CONSTANT_SLOTS)


def measure_composition(arguments: argparse.Namespace, row: str) -> dict[str, Any]:
    """All domains of a stream that a registry has, in one composition: what is kept of each, and of general text."""
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
    """The composition of one row.

    Args:
        column: The domain whose text will be read, for rows in which it is known.
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
    router = build_router(packs, prior, width=base.layout.width)
    if row in ROUTED:
        keep_terms(router, row.split("+"))
    return attach(base.model, stack, router=router)


def constant_slots(row: str, column: str, names: tuple[str, ...]) -> Float[Tensor, " slots"]:
    """Slot gates that do not depend on the text."""
    if row == "static-equal":
        open_slots = [name for name in names if name != GENERAL]
    else:
        open_slots = [column if column in names else GENERAL]
    return torch.tensor([float(name in open_slots) / len(open_slots) for name in names])


def keep_terms(router: DomainRouter, terms: list[str]) -> None:
    """Takes every other kind of evidence out of a router."""
    for term, buffers in TERMS.items():
        if term not in terms:
            for name in buffers:
                router.get_buffer(name).zero_()
