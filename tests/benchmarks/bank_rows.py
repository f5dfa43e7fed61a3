"""Ablations of a single bank: its shape and its initialization.

The bank is trained on the bare base, with slot gate 1 and without KP bank, on every other row of a domain.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from streams import Domain, read_stream
from transformers import PreTrainedModel

from lorary.adapters.allocation import expert_free_layers
from lorary.adapters.bank import ExpertBank, new_bank
from lorary.adapters.config import BankConfig, TrainingConfig
from lorary.adapters.layer.attach import attach, trained_bank
from lorary.adapters.layer.stack import Stack
from lorary.adapters.training.train import train_bank
from lorary.adapters.training.warm_start import activation_weights, copy_experts, seed_expert_gates
from lorary.domains.data.blocks import Blocks, encode, pack_blocks
from lorary.domains.data.corpus import read_examples
from lorary.domains.data.example import Example
from lorary.domains.progress import silent
from lorary.domains.scoring.language import score_language
from lorary.domains.statistics.measure import block_means
from lorary.domains.statistics.prototypes import PrototypeIndex, make_prototypes
from lorary.registry.base.find import POCKET, find_base
from lorary.registry.base.load import LoadedBase

# 64 ranks over 8 layers; alpha is constant, so scale * expert gate is the same for any number of experts
SHAPES: dict[str, dict[str, Any]] = {
    "linear": {},
    "quarters": {"schedule": "quarters"},
    "uniform": {"schedule": "uniform"},
    "data": {"schedule": "data"},
    "free-quarter": {"experts": 16 / 6, "expert_free": 0.25},
    "one-expert": {"experts": 1.0, "rank": 8},
    "four-experts": {"experts": 4.0, "rank": 2},
    "no-rank-gates": {"experts": 17 / 8, "rank_gates": False},  # one more expert in place of the gates' parameters
    "one-expert-no-rank-gates": {"experts": 1.0, "rank": 8, "rank_gates": False},
}
STARTS = ("zero", "random", "neighbour", "stranger")
COPIED = ("neighbour", "stranger")
RANDOM_B = 0.02  # standard deviation of B in the row `random`


def measure_bank(arguments: argparse.Namespace, row: str) -> dict[str, Any]:
    """Train one bank and score it on the domain's test text."""
    base = LoadedBase(find_base(POCKET))
    stream = read_stream(
        arguments.stream, arguments.data, order="forward", domains=None, max_bytes=arguments.max_bytes, questions=0
    )
    domain = next(each for each in stream if each.name == arguments.domain)
    blocks = _blocks(domain.training_examples()[::2], base, arguments)
    config = BankConfig(**SHAPES.get(row, {}))
    bank = _fresh(base, config, blocks, arguments.seed)
    notes = initialize_bank(row, bank, blocks, base, stream, arguments)
    model, losses = _trained(base, bank, blocks, arguments)
    return {
        "domain": domain.name,
        "bank": asdict(config),
        "counts": bank.counts(base.layout.count),
        "parameters": bank.parameters,
        "base": _bits(base.model, base, domain.texts),
        "bits": _bits(model, base, domain.texts),
        "losses": losses,
    } | notes


def initialize_bank(
    row: str,
    bank: ExpertBank,
    blocks: Blocks,
    base: LoadedBase,
    stream: Sequence[Domain],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Initialize a new bank, whose A is random and B zero.

    Rows of shapes start like `add-domain` without a similar domain: expert gates at centroids of the activations.

    Returns:
        For copied experts, their domain and its similarity; `add-domain` copies from `warm_start.MIN_SIMILARITY` on.
    """
    if row in COPIED:
        rows, name = _source_text(row, stream, base, arguments)
        source = _fresh(base, BankConfig(), rows, arguments.seed + 100)
        seed_expert_gates(source, base.model, rows)
        copy_experts(trained_bank(_trained(base, source, rows, arguments)[0]), bank)
        return {"lender": name, "similarity": _similarity(blocks, rows, base, arguments)}
    if row == "random":
        generator = torch.Generator().manual_seed(arguments.seed + 1)
        for layer in bank.layers.values():
            for matrix in layer.B.values():
                matrix.normal_(std=RANDOM_B, generator=generator)
    if row != "zero":
        seed_expert_gates(bank, base.model, blocks)
    return {}


def _source_text(
    row: str, stream: Sequence[Domain], base: LoadedBase, arguments: argparse.Namespace
) -> tuple[Blocks, str]:
    """Return the other half of the domain's rows (`neighbour`) or the next domain of the stream (`stranger`)."""
    found = {domain.name: domain for domain in stream}
    after = dict(pairwise([*found, stream[0].name]))
    name = arguments.domain if row == "neighbour" else after[arguments.domain]
    examples = found[name].training_examples()
    return _blocks(examples[1::2] if row == "neighbour" else examples, base, arguments), name


def _similarity(blocks: Blocks, others: Blocks, base: LoadedBase, arguments: argparse.Namespace) -> float:
    """Return the similarity of two texts by their prototypes, centred on general text as in `add-domain`."""
    general = _blocks(list(read_examples([arguments.data / "general" / "lm.train.jsonl"])), base, arguments)
    layer = expert_free_layers(base.layout.count, BankConfig().expert_free)
    means = [block_means(base.model, base.layout, each, layer=layer) for each in (general, blocks, others)]
    centre = means[0].double().mean(0)
    prototypes = [make_prototypes(each, centre) for each in means[1:]]
    return PrototypeIndex(["other"], prototypes[1:]).neighbours(prototypes[0])[0].similarity


def _blocks(examples: Sequence[Example], base: LoadedBase, arguments: argparse.Namespace) -> Blocks:
    return pack_blocks([encode(example, base.tokenizer) for example in examples], arguments.block)


def _fresh(base: LoadedBase, config: BankConfig, blocks: Blocks, seed: int) -> ExpertBank:
    layers = range(expert_free_layers(base.layout.count, config.expert_free), base.layout.count)
    weights = activation_weights(base.model, blocks, layers=layers) if config.schedule == "data" else None
    generator = torch.Generator().manual_seed(seed)
    return new_bank(base.model, base.layout, config, generator=generator, weights=weights)


def _trained(
    base: LoadedBase, bank: ExpertBank, blocks: Blocks, arguments: argparse.Namespace
) -> tuple[PreTrainedModel, list[float]]:
    stack = Stack(names=("alone",), banks=(bank,), trainable=True)
    model = attach(base.model, stack, router=None, fixed=torch.ones(1))
    recipe = TrainingConfig(
        steps=arguments.steps, block=arguments.block, seed=arguments.seed, checkpoint_every=arguments.steps
    )
    with tempfile.TemporaryDirectory() as run:
        figures = train_bank(model, blocks, recipe, run=Path(run), stage="training", on_progress=silent)
    return model, figures["losses"]


def _bits(model: PreTrainedModel, base: LoadedBase, texts: Sequence[Example]) -> float:
    return score_language(model, base.tokenizer, texts).bits_per_byte
