"""Measured statistics against a slow reading of the definition, one token at a time."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from lorary.domains.base_model import find_layout
from lorary.domains.data.blocks import Encoded
from lorary.domains.statistics.fading import HALF_LIFE
from lorary.domains.statistics.hashing import MAX_FEATURES, PAIR_BUCKETS, feature_projection, pair_buckets
from lorary.domains.statistics.measure import LONG_ANSWER, WINDOW, measure_statistics
from lorary.domains.statistics.statistics import DomainStatistics
from lorary.domains.statistics.token_roles import NEUTRAL, TokenRoles

VOCABULARY, MARKER = 40, 39
FLAGS = torch.tensor([0] * MARKER + [NEUTRAL], dtype=torch.uint8)
ROLES = TokenRoles(FLAGS, weights=torch.linspace(0.05, 1.0, VOCABULARY))

Tokens = list[int]
words = st.lists(st.integers(0, MARKER - 1), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return tiny_llama(vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def measure(model: LlamaForCausalLM) -> Callable[..., DomainStatistics]:
    def run(*texts: Encoded, layer: int = 0, roles: TokenRoles = ROLES, **options: Any) -> DomainStatistics:
        return measure_statistics(model, find_layout(model), texts, layer=layer, roles=roles, **options)

    return run


def running(ids: Tokens) -> Encoded:
    return ids, [True] * len(ids)


def answered(prompt: Tokens, answer: Tokens) -> Encoded:
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def mean_at(ids: Tokens, model: LlamaForCausalLM, roles: TokenRoles = ROLES) -> Tensor:
    """The faded and weighted mean of the text's features at its end."""
    embeddings = model.get_parameter("model.embed_tokens.weight").detach().double()
    text = [token for token in ids if not roles.neutral[token]]
    total, weight = torch.zeros(embeddings.shape[1], dtype=torch.float64), 0.0
    for age, token in enumerate(reversed(text)):
        feature = embeddings[token] / (embeddings[token].square().mean() + 1e-6).sqrt()
        share = 2 ** (-age / HALF_LIFE) * (1.0 if roles.weights is None else roles.weights[token].item())
        total, weight = total + share * feature, weight + share
    return total / weight


def assert_rows(found: DomainStatistics, rows: list[Tensor]) -> None:
    """The feature rows of the statistics are these."""
    expected = torch.stack(rows)
    assert found.rows == len(rows)
    torch.testing.assert_close(found.feature_sum, expected.sum(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.feature_outer, expected.T @ expected, rtol=1e-4, atol=1e-3)


def assert_near(found: DomainStatistics, expected: DomainStatistics) -> None:
    """Counts are equal, and moments to rounding."""
    assert torch.equal(found.token_counts, expected.token_counts)
    assert torch.equal(found.pair_counts, expected.pair_counts)
    assert found.rows == expected.rows
    torch.testing.assert_close(found.feature_sum, expected.feature_sum, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.feature_outer, expected.feature_outer, rtol=1e-4, atol=1e-3)


# --- counts ---


@settings(max_examples=8)
@given(texts=st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=30), min_size=1, max_size=4))
def test_tokens_and_pairs_are_counted_across_those_of_the_template(texts: list[Tokens], measure: Any) -> None:
    tokens, pairs = [0] * VOCABULARY, [0] * PAIR_BUCKETS
    for text in texts:
        kept = [token for token in text if token != MARKER]
        for token in kept:
            tokens[token] += 1
        for earlier, later in zip(kept, kept[1:], strict=False):
            pairs[int(pair_buckets(torch.tensor(earlier), torch.tensor(later)))] += 1

    found = measure(*map(running, texts))

    assert found.token_counts.tolist() == tokens
    assert found.pair_counts.tolist() == pairs


# --- rows ---


@settings(max_examples=8)
@given(text=words)
def test_running_text_has_rows_at_powers_of_two_and_at_its_end(
    text: Tokens, measure: Any, model: LlamaForCausalLM
) -> None:
    lengths = sorted({2**i for i in range(len(text).bit_length()) if 2**i < len(text)} | {len(text)})

    assert_rows(measure(running(text)), [mean_at(text[:length], model) for length in lengths])


@settings(max_examples=8)
@given(prompt=words, answer=words)
def test_a_prompt_has_a_row_at_its_end_and_a_long_answer_others(
    prompt: Tokens, answer: Tokens, measure: Any, model: LlamaForCausalLM
) -> None:
    whole, rows = prompt + answer, [mean_at(prompt, model)]
    if len(answer) >= LONG_ANSWER:
        lengths = sorted({2**i for i in range(len(whole).bit_length()) if 2**i < len(whole)} | {len(whole)})
        rows += [mean_at(whole[:length], model) for length in lengths]

    assert_rows(measure(answered(prompt, answer)), rows)


def test_a_text_longer_than_a_window_is_read_in_windows_from_its_end(measure: Any, model: LlamaForCausalLM) -> None:
    text = torch.randint(0, MARKER, (WINDOW + 3,), generator=torch.Generator().manual_seed(0)).tolist()
    first, last = text[:3], text[3:]
    lengths = [2**i for i in range(WINDOW.bit_length()) if 2**i < WINDOW] + [WINDOW]

    found = measure(running(text))

    assert_rows(found, [mean_at(first[:n], model) for n in (1, 2, 3)] + [mean_at(last[:n], model) for n in lengths])


def test_without_weights_all_features_weigh_the_same(measure: Any, model: LlamaForCausalLM) -> None:
    roles = replace(ROLES, weights=None)

    found = measure(answered([3, 30, 7, 7], [1]), roles=roles)

    assert_rows(found, [mean_at([3, 30, 7, 7], model, roles)])
    assert not torch.allclose(found.feature_sum, measure(answered([3, 30, 7, 7], [1])).feature_sum, atol=1e-3)


# --- what does not matter ---


@settings(max_examples=8)
@given(texts=st.lists(st.tuples(words, words), min_size=2, max_size=5), layer=st.integers(0, 1))
def test_texts_together_are_the_sum_of_each_alone(texts: list[tuple[Tokens, Tokens]], layer: int, measure: Any) -> None:
    """Whatever else is in a batch, and however much padding."""
    examples = [answered(*text) if i % 2 else running(sum(text, [])) for i, text in enumerate(texts)]

    first, *rest = [measure(example, layer=layer) for example in examples]

    assert_near(measure(*examples, layer=layer), reduce(add, rest, first))


@settings(max_examples=8)
@given(prompt=words, answer=words, places=st.lists(st.integers(0, 40), max_size=5))
def test_tokens_of_the_template_change_nothing(prompt: Tokens, answer: Tokens, places: list[int], measure: Any) -> None:
    framed = list(prompt)
    for place in places:
        framed.insert(min(place, len(framed)), MARKER)

    assert_near(measure(answered([MARKER, *framed, MARKER], answer)), measure(answered(prompt, answer)))


def test_texts_of_nothing_but_the_template_are_no_text(measure: Any) -> None:
    found = measure(running([MARKER, MARKER]), running([]))

    assert found.rows == found.token_counts.sum() == found.pair_counts.sum() == 0
    assert found.hashed is not None
    assert found.hashed.rows == 0
    assert not found.feature_sum.any()


# --- other editions, and wide bases ---


def test_the_first_edition_counts_every_token_and_forgets_nothing(measure: Any, model: LlamaForCausalLM) -> None:
    text = [5, MARKER, 9, 9, 30]
    embeddings = model.get_parameter("model.embed_tokens.weight").detach().double()
    features = embeddings * torch.rsqrt(embeddings.square().mean(1, keepdim=True) + 1e-6)

    found = measure(running(text), first_edition=True)

    assert found.hashed is None
    assert found.token_counts[MARKER] == 1
    assert_rows(found, [features[text[:length]].mean(0) for length in (1, 2, 4, 5)])


def test_features_of_a_wide_base_are_projected(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    width = MAX_FEATURES + 32
    wide = tiny_llama(vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=1, head_dim=8, intermediate_size=8)
    projection = feature_projection(width)
    assert projection is not None

    found = measure_statistics(wide, find_layout(wide), [answered([3, 8, 21], [1])], layer=0, roles=ROLES)

    assert len(found.feature_sum) == MAX_FEATURES
    torch.testing.assert_close(found.feature_sum, projection.double() @ mean_at([3, 8, 21], wide), rtol=1e-4, atol=1e-4)


def test_hashed_rows_are_divided_by_the_root_of_their_length(measure: Any) -> None:
    """So that a row's square is near the number of kinds that each of its tokens adds."""
    text = list(range(16)) * 2

    found = measure(answered(text, [1])).hashed

    size = math.sqrt(found.mean.double().square().sum())
    assert found.rows == 1
    assert 0.9 < size < 2.1
