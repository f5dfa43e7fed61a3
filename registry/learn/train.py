"""Learning one bank: data to blocks, statistics, prototypes, a warm start, training, and the frozen proof.

A domain is trained on base + KP only, under the gates that the router of {KP, domain} really gives; never on top of
other domains' experts, so that every subset is what was trained. The KP bank itself is trained alone, its slot gate 1.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters.allocation import expert_free_layers
from ...adapters.bank import Expert, ExpertBank, extend_bank, new_bank
from ...adapters.composition import GENERAL
from ...adapters.config import BankConfig, TrainingConfig
from ...adapters.layer.attach import attach, routing_of, trained_bank
from ...adapters.layer.gates import LayerGates
from ...adapters.layer.stack import Stack
from ...adapters.router.router import DomainRouter, Temperatures
from ...adapters.training.train import discard_checkpoints, divergence_error, train_bank
from ...adapters.training.warm_start import (
    MIN_SIMILARITY,
    activation_weights,
    can_copy_experts,
    copy_experts,
    seed_expert_gates,
)
from ...domains.base_model import target_modules
from ...domains.data.blocks import Blocks, encode, pack_blocks
from ...domains.data.example import Example
from ...domains.errors import InputError, IntegrityError
from ...domains.progress import OnProgress
from ...domains.statistics.prototypes import Neighbour, PrototypeIndex, join_prototypes, make_prototypes
from ...domains.statistics.statistics import DomainStatistics
from ..base.load import LoadedBase
from ..compose.plan import KP_PRIOR
from ..pack.pack import DomainPack, RoutingData
from ..store.store import Store
from .context import Ground, measure, measure_over
from .proof import check_only_new_is_trainable, frozen_digests, prove

OnNeighbours = Callable[[list[Neighbour]], None]


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What is to be learned, and how."""

    name: str
    train: Sequence[Example]
    bank: BankConfig
    training: TrainingConfig
    run: Path


@dataclass(frozen=True, kw_only=True)
class Learned:
    """The outcome: a pack that may be committed, its proof, and what a person wants to know."""

    pack: DomainPack
    proof: dict[str, Any]
    figures: dict[str, Any]  # of the training run
    neighbours: list[Neighbour] = field(default_factory=list)
    lender: str | None = None  # whose experts were copied as a start


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a bank is before it is trained, and the text that it will stand for."""

    bank: ExpertBank
    older: ExpertBank | None  # generations of experts beside which it is trained; they stay frozen
    statistics: DomainStatistics
    prototypes: Tensor


def learn_preservation(lesson: Lesson, *, base: LoadedBase, store: Store, on_progress: OnProgress) -> Learned:
    """Trains the KP bank on general text."""
    _check_fits(lesson, base)
    blocks = _blocks(lesson, base)
    layer = feature_layer(lesson.bank, base)
    statistics, means = measure(lesson.name, blocks, base, layer, on_progress)
    bank = _fresh_bank(lesson, base, blocks)
    seed_expert_gates(bank, base.model, blocks)
    stack = Stack(names=(lesson.name,), banks=(bank,), trainable=True)
    composed = attach(base.model, stack, router=None, fixed=torch.ones(1))
    proof, figures = _train_and_prove(lesson, composed, blocks, base=base, store=store, on_progress=on_progress)
    pack = DomainPack(
        bank=_with_mean_gates(composed, blocks),
        statistics=statistics,
        prototypes=make_prototypes(means, statistics.feature_mean),
        temperatures=Temperatures(),
        feature_layer=layer,
    )
    return Learned(pack=pack, proof=proof, figures=figures)


def learn_domain(
    lesson: Lesson,
    ground: Ground,
    *,
    others: Mapping[str, RoutingData],
    lend_bank: Callable[[str], ExpertBank],
    on_neighbours: OnNeighbours = lambda _neighbours: None,
) -> Learned:
    """Trains a new domain's bank over base + KP.

    Args:
        others: What the stored domains route by, for neighbours and the warm start.
        lend_bank: Reads the bank of one of them.
        on_neighbours: Told which stored domains are like this one, nearest first, before training begins.
    """
    base = ground.base
    _check_fits(lesson, base)
    _check_first_layer(lesson, ground)
    blocks = _blocks(lesson, base)
    statistics, prototypes = measure_over(ground, lesson.name, blocks)
    neighbours = PrototypeIndex(list(others), [other.prototypes for other in others.values()]).neighbours(prototypes)
    on_neighbours(neighbours)
    bank = _fresh_bank(lesson, base, blocks)
    lender = _warm_start(bank, blocks, base, lend_bank, neighbours)
    start = Start(bank=bank, older=None, statistics=statistics, prototypes=prototypes)
    learned = _learn(lesson, ground, start, blocks)
    return replace(learned, neighbours=neighbours, lender=lender)


def learn_more(lesson: Lesson, ground: Ground, parent: DomainPack, *, mode: str) -> Learned:
    """Trains a domain's next version from a stored one, over base + KP.

    Args:
        parent: The version that it comes from.
        mode: `extend` adds a generation of experts to the parent's, which stay frozen; `continue` trains a copy of the
            parent's; both add the statistics. `fresh` takes nothing from the parent.
    """
    base = ground.base
    _check_fits(lesson, base)
    if mode != "continue":
        _check_first_layer(lesson, ground)
    blocks = _blocks(lesson, base)
    statistics, prototypes = measure_over(ground, lesson.name, blocks)
    if mode != "fresh":
        shares = [parent.statistics.rows, statistics.rows]
        prototypes = join_prototypes([parent.prototypes, prototypes], shares)
        statistics = parent.statistics + statistics
    older = parent.bank if mode == "extend" else None
    if mode == "continue":
        bank = copy.deepcopy(parent.bank)
    else:
        bank = _fresh_bank(lesson, base, blocks, older=older.experts if older else ())
        seed_expert_gates(bank, base.model, blocks)
    start = Start(bank=bank, older=older, statistics=statistics, prototypes=prototypes)
    return _learn(lesson, ground, start, blocks)


def _learn(lesson: Lesson, ground: Ground, start: Start, blocks: Blocks) -> Learned:
    """Trains a bank under the gates that the composition of KP and its domain will have."""
    base, preservation = ground.base, ground.preservation
    slots = [preservation.statistics, start.statistics]
    prior = torch.tensor([KP_PRIOR, 1 - KP_PRIOR])
    router = DomainRouter(slots, prior=prior, temperatures=Temperatures(), width=base.layout.width)
    banks = [preservation.bank, start.older, start.bank]
    stack = Stack(names=(GENERAL, lesson.name), banks=tuple(filter(None, banks)), trainable=True)
    composed = attach(base.model, stack, router=router)
    proof, figures = _train_and_prove(
        lesson, composed, blocks, base=base, store=ground.store, on_progress=ground.on_progress
    )
    trained = _with_mean_gates(composed, blocks)
    pack = DomainPack(
        bank=extend_bank(start.older, trained) if start.older else trained,
        statistics=start.statistics,
        prototypes=start.prototypes,
        temperatures=Temperatures(),
        feature_layer=preservation.feature_layer,
    )
    return Learned(pack=pack, proof=proof, figures=figures)


def feature_layer(config: BankConfig, base: LoadedBase) -> int:
    """The first expert-bearing decoder layer, whose input the router reads."""
    return expert_free_layers(base.layout.count, config.expert_free)


def _check_fits(lesson: Lesson, base: LoadedBase) -> None:
    """Refuses what the base model has no room for, before anything is read.

    Raises:
        InputError: An expert would be wider than the model, a block longer than its context, or a target is not there.
    """
    width, rank, block = base.layout.width, lesson.bank.rank, lesson.training.block
    longest = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    if rank > width:
        raise InputError(
            f"Experts of rank {rank:,} are wider than the base model.",
            cause=f"its hidden state has {width:,} numbers: a higher rank can add nothing",
            fix=f"choose --rank {width} or less",
        )
    if longest is not None and block > longest:
        raise InputError(
            f"Blocks of {block:,} tokens are longer than the base model reads.",
            cause=f"it reads {longest:,} tokens",
            fix=f"choose --block {longest} or less",
        )
    target_modules(base.model, base.layout, lesson.bank.targets)


def _check_first_layer(lesson: Lesson, ground: Ground) -> None:
    """Refuses experts in front of the layer whose input the router reads: they would change what it reads.

    Raises:
        InputError: There would be some.
    """
    base, least = ground.base, ground.preservation.feature_layer
    first = feature_layer(lesson.bank, base)
    if first < least:
        raise InputError(
            f"expert_free is too small: {lesson.bank.expert_free}.",
            cause=f"experts would begin in layer {first}, those of KP begin in layer {least}",
            fix=f"choose at least {least / base.layout.count:g}",
        )


def _blocks(lesson: Lesson, base: LoadedBase) -> Blocks:
    return pack_blocks([encode(example, base.tokenizer) for example in lesson.train], lesson.training.block)


def _fresh_bank(lesson: Lesson, base: LoadedBase, blocks: Blocks, *, older: Sequence[Expert] = ()) -> ExpertBank:
    generator = torch.Generator().manual_seed(lesson.training.seed)
    weights = None
    if lesson.bank.schedule == "data":
        weights = activation_weights(base.model, blocks, first_layer=feature_layer(lesson.bank, base))
    return new_bank(base.model, base.layout, lesson.bank, generator=generator, weights=weights, older=older)


def _warm_start(
    bank: ExpertBank,
    blocks: Blocks,
    base: LoadedBase,
    lend_bank: Callable[[str], ExpertBank],
    neighbours: list[Neighbour],
) -> str | None:
    """Starts from the nearest domain's experts if it is close and of the same shape, else from activations."""
    nearest = neighbours[0] if neighbours else None
    if nearest and nearest.similarity >= MIN_SIMILARITY:
        lender = lend_bank(nearest.name)
        if can_copy_experts(lender, bank):
            copy_experts(lender, bank)
            return nearest.name
    seed_expert_gates(bank, base.model, blocks)
    return None


def _train_and_prove(
    lesson: Lesson,
    composed: PreTrainedModel,
    blocks: Blocks,
    *,
    base: LoadedBase,
    store: Store,
    on_progress: OnProgress,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains the new bank between two sets of digests.

    Raises:
        IntegrityError: Something frozen was trainable or has changed, or the loss is not finite. Nothing is stored.
    """
    before = frozen_digests(base.model, composed, store)
    check_only_new_is_trainable(composed)
    try:
        figures = train_bank(
            composed,
            blocks,
            lesson.training,
            run=lesson.run,
            stage=f"training {lesson.name}",
            on_progress=on_progress,
        )
        check_only_new_is_trainable(composed)
        proof = prove(before, frozen_digests(base.model, composed, store))
        _check_finite(composed, lesson)
    except IntegrityError:
        # its checkpoints are of a run that was not what it should be
        discard_checkpoints(lesson.run)
        raise
    return proof, figures


def _check_finite(composed: PreTrainedModel, lesson: Lesson) -> None:
    bad = [name for name, tensor in trained_bank(composed).tensors() if not torch.isfinite(tensor).all()]
    if bad:
        rate = lesson.training.learning_rate or 0.01
        raise divergence_error(f"the new bank has values that are not finite, first in {bad[0]}", rate)


@torch.inference_mode()
def _with_mean_gates(composed: PreTrainedModel, blocks: Blocks, sampled: int = 16) -> ExpertBank:
    """The trained bank with each rank's mean of expert gate times rank gate on its own text, for static use."""
    routing = routing_of(composed)
    bank = trained_bank(composed)
    device = next(composed.parameters()).device
    ids, mask = blocks.input_ids[:sampled].to(device), blocks.attention_mask[:sampled].to(device)
    states = composed(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    slot = len(routing.stack.names) - 1
    only = torch.zeros(1, 1, slot + 1, device=device)
    only[..., slot] = 1.0
    weight = mask.unsqueeze(-1).float()
    for index, layer in bank.layers.items():
        gates: LayerGates = composed.get_submodule(f"{routing.layout.layers}.{index}.expert_gates")  # type: ignore[assignment]
        own = gates(states[index], only)[..., -layer.rank :]
        layer.mean_gate = ((own * weight).sum((0, 1)) / weight.sum()).float().cpu()
    return bank
