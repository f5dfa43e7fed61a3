"""What must hold for a base of any family, each checked against the base itself or against merged weights.

A base that differs with padding or with its own cache is compared no further than it agrees with itself.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorary.adapters.bank import ExpertBank, new_bank
from lorary.adapters.config import BankConfig
from lorary.adapters.layer.attach import attach, trained_bank
from lorary.adapters.layer.merge import merge_experts
from lorary.adapters.layer.stack import Stack
from lorary.adapters.router.router import DomainRouter, Temperatures
from lorary.domains.base_model import find_layout
from lorary.domains.statistics.hashing import PAIR_BUCKETS, pair_buckets
from lorary.domains.statistics.statistics import DomainStatistics
from lorary.domains.target_modules import Targets, find_targets

NAMES = ("general", "law", "medicine")
TEXT, PROMPT = 12, 7  # tokens of a text, and of the prompt that decoding starts from
TOLERANCE = 2e-4  # of a logit, relative to the largest one
NOISE = 5  # times the base's own difference


@dataclass
class Findings:
    """What was found out about a base."""

    targets: Targets
    notes: list[str] = field(default_factory=list)  # where the base differs from itself


def check_base(base: PreTrainedModel) -> Findings:
    """Run all checks on a base model.

    Raises:
        AssertionError: One failed.
        LoraryError: The base is refused.
    """
    layout = find_layout(base)
    found = Findings(find_targets(base, layout))
    banks = tuple(_random_bank(base, found.targets, seed) for seed in range(3))
    stack = Stack(names=NAMES, banks=banks)
    composed = attach(base, stack, router=_router(base))
    ids = _ids(2, TEXT)
    expected = _logits(base, ids)
    scale = expected.abs().max()

    empty = attach(base, Stack(names=NAMES, banks=tuple(map(_without_effect, banks))), router=_router(base))
    assert torch.equal(_logits(empty, ids), expected), "experts of zero change the base's logits"
    assert (_logits(composed, ids) - expected).abs().max() > 1e-3 * scale, "experts have no effect"

    _check_merged(base, banks, ids)
    for what, difference in {
        "with a key-value cache": _cached,
        "with left padding": lambda model: _padded(model, left=True),
        "with right padding": lambda model: _padded(model, left=False),
    }.items():
        own, ours = difference(base) / scale, difference(composed) / scale
        assert ours <= max(TOLERANCE, NOISE * own), f"logits differ {what}: {ours:.1e}, the base's {own:.1e}"
        if own > TOLERANCE:
            found.notes.append(f"the base itself differs {what}")
    _check_beams(base, composed, found)
    _check_training(base, banks, ids)
    return found


def _check_merged(base: PreTrainedModel, banks: tuple[ExpertBank, ...], ids: Tensor) -> None:
    """Compare the fused modules with merged weights, which do not depend on how a module is called."""
    static = Stack(names=NAMES, banks=banks, static=True)
    composed = attach(base, static, router=None, fixed=torch.tensor([0.5, 0.3, 0.2]))
    fused = _logits(composed, ids)
    merged = _logits(merge_experts(composed), ids)
    assert (fused - merged).abs().max() <= TOLERANCE * fused.abs().max(), "fused and merged weights differ"


def _check_beams(base: PreTrainedModel, composed: PreTrainedModel, found: Findings) -> None:
    def generated(model: Any, *, use_cache: bool) -> Tensor:
        ids = _ids(2, PROMPT)
        options: dict[str, Any] = {"num_beams": 2, "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
        with torch.no_grad():
            made: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use_cache, **options)
        return made

    if not torch.equal(generated(base, use_cache=True), generated(base, use_cache=False)):
        found.notes.append("the base itself differs in beam search")
    else:
        same = torch.equal(generated(composed, use_cache=True), generated(composed, use_cache=False))
        assert same, "beam search differs with a key-value cache"


def _check_training(base: PreTrainedModel, banks: tuple[ExpertBank, ...], ids: Tensor) -> None:
    """Compare the gradient with a difference of losses in the direction of the gradient."""
    stack = Stack(names=NAMES[:2], banks=banks[:2], trainable=True)
    composed = attach(base, stack, router=_router(base, slots=2)).eval()
    trained = [parameter for parameter in composed.parameters() if parameter.requires_grad]

    def loss() -> Tensor:
        logits = composed(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    loss().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    squared = sum(float(gradient.double().pow(2).sum()) for gradient in gradients)
    assert squared > 0, "no gradient"
    # of several steps, because the loss jumps where a base's router changes its mind
    slopes = [_slope(loss, trained, gradients, size / squared**0.5) for size in (1e-2, 1e-3, 1e-4)]
    error = min(abs(slope - squared) for slope in slopes)
    assert error <= 0.05 * squared, f"the squared gradient is {squared:.3e}, the loss changes by {slopes}"
    assert trained_bank(composed).layers.keys() == banks[1].layers.keys()


def _slope(loss: Callable[[], Tensor], parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: float) -> float:
    losses = []
    for distance in (step, -step):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add_(gradient, alpha=distance)
            losses.append(float(loss()))
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=distance)
    return (losses[0] - losses[1]) / (2 * step)


def _cached(model: PreTrainedModel) -> Tensor:
    """Return the largest difference of logits between a whole text and decoding it token by token."""
    ids = _ids(2, TEXT)
    with torch.no_grad():
        output: Any = model(input_ids=ids[:, :PROMPT], attention_mask=torch.ones(2, PROMPT).long(), use_cache=True)
        found = [output.logits]
        for end in range(PROMPT + 1, TEXT + 1):
            if output.get("past_key_values") is not None:
                given = {"past_key_values": output.past_key_values, "attention_mask": torch.ones(2, end).long()}
            elif output.get("cache_params") is not None:  # state-space models take no mask of earlier positions
                given = {"cache_params": output.cache_params}
            else:  # the family has no cache
                return torch.tensor(0.0)
            output = model(input_ids=ids[:, end - 1 : end], use_cache=True, **given)
            found.append(output.logits)
    return (torch.cat(found, 1) - _logits(model, ids)).abs().max()


def _padded(model: PreTrainedModel, *, left: bool) -> Tensor:
    """Return the largest difference of logits between a padded text and the text alone."""
    ids = _ids(1, PROMPT)
    filling = torch.zeros(1, TEXT - PROMPT, dtype=torch.long)
    parts = [filling, ids] if left else [ids, filling]
    masks = [torch.zeros_like(filling), torch.ones_like(ids)] if left else [torch.ones_like(ids), filling]
    batch = torch.cat([torch.cat(parts, 1), _ids(1, TEXT)])
    mask = torch.cat([torch.cat(masks, 1), torch.ones(1, TEXT, dtype=torch.long)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    place = slice(TEXT - PROMPT, None) if left else slice(0, PROMPT)
    with torch.no_grad():
        try:
            logits = model(input_ids=batch, attention_mask=mask, position_ids=positions, use_cache=False).logits
        except TypeError:  # the family takes no positions
            logits = model(input_ids=batch, attention_mask=mask, use_cache=False).logits
    return (logits[:1, place] - _logits(model, ids)).abs().max()


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def _ids(batch: int, seq: int) -> Tensor:
    return torch.randint(3, 50, (batch, seq), generator=torch.Generator().manual_seed(seq))


def _random_bank(base: PreTrainedModel, targets: Targets, seed: int) -> ExpertBank:
    """Return a bank whose experts extend every target and matter."""
    generator = torch.Generator().manual_seed(seed)
    config = BankConfig(experts=2.0, rank=2, expert_free=0.25, schedule="uniform")
    bank = new_bank(base, find_layout(base), config, generator=generator, targets=targets)
    for layer in bank.layers.values():
        for matrix in layer.B.values():
            matrix.normal_(0, 0.05, generator=generator)
        assert layer.rank_gate is not None
        layer.rank_gate.normal_(0, 0.1, generator=generator)
    return bank


def _without_effect(bank: ExpertBank) -> ExpertBank:
    empty = copy.deepcopy(bank)
    for layer in empty.layers.values():
        for matrix in layer.B.values():
            matrix.zero_()
    return empty


def _router(base: PreTrainedModel, *, slots: int = 3) -> DomainRouter:
    """Return a router of synthetic domains."""
    config, statistics = base.config.get_text_config(decoder=True), []
    make: Callable[..., Tensor] = torch.randn
    for slot in range(slots):
        generator = torch.Generator().manual_seed(slot)
        weights = torch.rand(config.vocab_size, generator=generator) ** 3 + 0.01
        drawn = torch.multinomial(weights, 2000, replacement=True, generator=generator)
        center = make(config.hidden_size, generator=generator, dtype=torch.float64) * 0.3
        rows = center + make(100, config.hidden_size, generator=generator, dtype=torch.float64)
        statistics.append(
            DomainStatistics(
                torch.bincount(drawn, minlength=config.vocab_size),
                torch.bincount(pair_buckets(drawn[:-1], drawn[1:]), minlength=PAIR_BUCKETS),
                100.0,
                rows.sum(0),
                rows.T @ rows,
            )
        )
    prior = torch.arange(slots, 0, -1).float()
    return DomainRouter(statistics, prior=prior, temperatures=Temperatures(), width=config.hidden_size)
