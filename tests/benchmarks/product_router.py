"""The product's router as routing.py measures it: every use of its interfaces is in this module."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorary.adapters.allocation import bearing_layers
from lorary.adapters.composition import GENERAL
from lorary.adapters.config import BankConfig
from lorary.adapters.router.router import DomainRouter, Temperatures
from lorary.domains.base_model import hidden_states_at, max_positions
from lorary.domains.data import prompt
from lorary.domains.data.blocks import encode
from lorary.domains.data.catalog import everyday_requests
from lorary.domains.data.example import Example
from lorary.domains.statistics.hashed_rows import hashed_moments
from lorary.domains.statistics.hashing import HASHED, PAIR_BUCKETS, feature_projection, pair_buckets
from lorary.domains.statistics.measure import measure_statistics
from lorary.domains.statistics.statistics import DomainStatistics, rounded
from lorary.domains.statistics.token_roles import TokenRoles
from lorary.registry.base.load import LoadedBase
from lorary.registry.compose.build import build_router
from lorary.registry.compose.plan import prior_shares
from lorary.registry.pack.pack import RoutingData

WINDOW = 512  # tokens whose hidden states are computed at once


@dataclass(frozen=True)
class Reading:
    """A text as the router reads it: token ids, and the input of the feature layer."""

    ids: Tensor  # (seq,)
    hidden: Tensor  # (seq, width)


def feature_layer(base: LoadedBase) -> int:
    """Return the decoder layer whose input the router of a default bank reads."""
    return bearing_layers(base.layout.count, BankConfig().expert_free)[0]


def measure_field(base: LoadedBase, field: str, examples: Sequence[Example]) -> RoutingData:
    """Return what a field with these training rows routes by; general text has everyday requests as well."""
    return measure(base, [*examples, *everyday_requests()] if field == GENERAL else examples)


def measure(base: LoadedBase, examples: Sequence[Example]) -> RoutingData:
    """Return what a domain with these training rows routes by, as add-domain measures it."""
    layer = feature_layer(base)
    texts = [encode(example, base.tokenizer) for example in examples]
    statistics = measure_statistics(base.model, base.layout, texts, layer=layer, roles=base.roles)
    return routing_data(statistics, torch.zeros(1, len(statistics.feature_sum)), layer)


def routing_data(statistics: DomainStatistics, prototypes: Tensor, layer: int) -> RoutingData:
    """Return the part of a pack that a router is built from."""
    return RoutingData(
        statistics=statistics,
        prototypes=prototypes,
        temperatures=Temperatures(),
        feature_layer=layer,
        first_layer=layer,
    )


def compose(parts: Sequence[RoutingData], width: int, roles: TokenRoles | None = None) -> DomainRouter:
    """Return the router of KP, the first part, and equally weighted domains."""
    priors = prior_shares({str(i): None for i in range(1, len(parts))})
    shares = [priors[GENERAL], *(priors[str(i)] for i in range(1, len(parts)))]
    return build_router(parts, torch.tensor(shares), width=width, roles=roles)


@torch.inference_mode()
def read(base: LoadedBase, ids: Sequence[int]) -> Reading:
    """Read a text of any length; hidden states beyond the embeddings see their own window only."""
    whole = torch.tensor([ids])
    window = min(WINDOW, max_positions(base.model) or WINDOW)
    layer = feature_layer(base)
    hidden = [hidden_states_at(base.model, base.layout, layer, input_ids=part)[0] for part in whole.split(window, 1)]
    return Reading(whole[0], torch.cat(hidden))


@torch.inference_mode()
def gates(router: DomainRouter, reading: Reading, *, as_prompt: bool = False) -> Tensor:
    """Return the slot gates at every position, (seq, slots)."""
    ids, hidden = reading.ids[None], reading.hidden[None]
    return router.text_gates(ids, hidden, torch.ones_like(ids, dtype=torch.bool), as_prompts=as_prompt)[0]


def end_gates(router: DomainRouter, readings: Sequence[Reading]) -> Tensor:
    """Return the slot gates of prompts that are read as a whole, (prompts, slots)."""
    return torch.stack([gates(router, reading, as_prompt=True)[-1] for reading in readings])


def prompt_ids(base: LoadedBase, example: Example) -> list[int]:
    """Return the tokens before the completion, or of a plain text all but the end token."""
    ids, is_target = encode(example, base.tokenizer)
    return ids[: is_target.index(True)] if example.prompt else ids[:-1]


def question_ids(base: LoadedBase, text: str, *, raw: bool) -> list[int]:
    """Return the tokens of a question: a user's turn of the base's chat template, or plain text."""
    return prompt.prompt_ids(text, base.tokenizer, raw=raw)


def text_ids(base: LoadedBase, text: str) -> list[int]:
    """Return the tokens of running text after the tokenizer's prefix."""
    return prompt.prompt_ids(text, base.tokenizer, raw=True)


def pairs_of(ids: Tensor) -> Tensor:
    """Return the hashed pair of each token but the first and the one before it."""
    return pair_buckets(ids[:-1], ids[1:])


def made_up_domain(vocabulary: int, width: int, *, tokens: int, pairs: int, seed: int) -> RoutingData:
    """Return the statistics of a domain that was never read: counts by Zipf's law on random tokens and pairs."""
    generator = torch.Generator().manual_seed(seed)
    counts = [
        _zipf_counts(kinds, distinct, generator) for kinds, distinct in ((vocabulary, tokens), (PAIR_BUCKETS, pairs))
    ]
    projection = feature_projection(width)
    features = width if projection is None else len(projection)
    rows = torch.randn(512, features, generator=generator, dtype=torch.float64)
    hashed = hashed_moments(torch.randn(256, HASHED, generator=generator) / HASHED**0.5)
    moments = float(len(rows)), rows.sum(0), rounded(rows.T @ rows), hashed
    statistics = DomainStatistics(counts[0], counts[1], *moments)
    return routing_data(statistics, torch.zeros(1, features), 0)


def _zipf_counts(kinds: int, distinct: int, generator: torch.Generator) -> Tensor:
    counts = torch.zeros(kinds, dtype=torch.int64)
    chosen = torch.randperm(kinds, generator=generator)[:distinct]
    counts[chosen] = (200_000 / torch.arange(1, len(chosen) + 1)).long().clamp(min=2)
    return counts


def router_bytes(router: DomainRouter) -> int:
    """Return the bytes of a router's tensors; those that share memory count once."""
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in router.tensors().values()}
    return sum(memory.values())


def count_bytes(parts: Sequence[RoutingData]) -> int:
    """Return the bytes of the packs' counts of tokens and pairs, which the router needs in some form."""
    return sum(
        tensor.nbytes
        for part in parts
        for name, tensor in part.statistics.tensors().items()
        if name.startswith(("token_", "pair_"))
    )
