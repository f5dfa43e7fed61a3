"""How texts are read: in parts, padded, packed, with a template around them, across a change of field, as prompts."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorary.adapters.router.cache import RouterCacheLayer, StaticRouterLayer
from lorary.adapters.router.packed import text_ends, text_starts
from lorary.adapters.router.router import DomainRouter, Temperatures, last_tokens, whole_prompts
from lorary.domains.statistics.fading import HALF_LIFE, faded_sums
from lorary.domains.statistics.hashed_rows import hashed_moments
from lorary.domains.statistics.hashing import HASHED, PAIR_BUCKETS, pair_buckets, signed_places
from lorary.domains.statistics.statistics import DomainStatistics, rounded
from lorary.domains.statistics.token_roles import NEUTRAL, OPENS, SENTENCE, TokenRoles

WORDS, COMMON, MARKERS, WIDTH, SLOTS = 400, 40, 8, 8, 4
VOCABULARY = WORDS + MARKERS + 1
STOP = VOCABULARY - 1  # a full stop; words begin with white space
SEED = st.integers(0, 2**31 - 1)
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def zipf_text(slot: int, length: int, *, seed: int = 0) -> Tensor:
    """Words by Zipf's law: those of all fields are the commonest, then those of the field, then those of others."""
    generator = torch.Generator().manual_seed(1000 * slot + seed)
    own = torch.arange(COMMON, WORDS).roll(-slot * (WORDS - COMMON) // SLOTS)
    order = torch.cat([torch.arange(COMMON), own])
    shares = 1 / (torch.arange(WORDS) + 5.0)
    shares[COMMON + (WORDS - COMMON) // SLOTS :] *= 0.2
    return order[torch.multinomial(shares, length, replacement=True, generator=generator)]


def embeddings() -> Tensor:
    return torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(7))


def hashed_row(ids: Tensor) -> Tensor:
    kinds = torch.cat([ids, VOCABULARY + pair_buckets(ids[:-1], ids[1:])])
    signed = signed_places(VOCABULARY)[kinds].long()
    row = torch.zeros(HASHED).index_add_(0, signed % HASHED, torch.where(signed < HASHED, 1.0, -1.0))
    return row / len(ids) ** 0.5


def statistics_of(slot: int, *, length: int = 8000) -> DomainStatistics:
    ids = zipf_text(slot, length, seed=99)
    pairs = torch.bincount(pair_buckets(ids[:-1], ids[1:]), minlength=PAIR_BUCKETS)
    pieces = ids.split(32)
    means = torch.stack([embeddings()[piece].mean(0) for piece in pieces]).double()
    rows = torch.stack([hashed_row(piece) for piece in pieces])
    counts = torch.bincount(ids, minlength=VOCABULARY)
    outer = rounded(means.T @ means)
    return DomainStatistics(counts, pairs, float(len(means)), means.sum(0), outer, hashed_moments(rows))


@pytest.fixture(scope="module")
def statistics() -> list[DomainStatistics]:
    return [statistics_of(slot) for slot in range(SLOTS)]


@pytest.fixture(scope="module")
def router(statistics: list[DomainStatistics]) -> DomainRouter:
    """Of four fields, whose base has markers, which are neutral, and a full stop."""
    flags = torch.full((VOCABULARY,), OPENS, dtype=torch.uint8)
    flags[WORDS : WORDS + MARKERS] = NEUTRAL
    flags[STOP] = SENTENCE
    prior = torch.tensor([2.0, 1.0, 1.0, 1.0])
    weights = torch.linspace(0.01, 1.0, VOCABULARY)
    roles = TokenRoles(flags, weights=weights)
    return DomainRouter(statistics, prior=prior, temperatures=Temperatures(), width=WIDTH, roles=roles)


def gates_of(router: DomainRouter, ids: Tensor, *, as_prompt: bool = False) -> Tensor:
    """The gates of one text."""
    mask = torch.ones(1, len(ids), dtype=torch.bool)
    return router.text_gates(ids[None], embeddings()[ids][None], mask, as_prompts=as_prompt)[0]


def sums_and_steps(router: DomainRouter, ids: Tensor) -> tuple[Tensor, Tensor]:
    is_text = router.text_mask(ids[None], torch.ones(1, len(ids), dtype=torch.bool))
    return router.increments(ids[None], embeddings()[ids][None], is_text), router.steps(ids[None], is_text)


def test_all_three_terms_are_at_work(router: DomainRouter) -> None:
    increments, _ = sums_and_steps(router, zipf_text(1, 20))

    assert router.has_ridge
    assert increments.shape[-1] == router.sums == 3 * SLOTS + 2
    assert all(part.abs().max() > 0 for part in increments.split([SLOTS, SLOTS, SLOTS, 1, 1], -1))


# --- in any parts ---


def test_at_32768_tokens_prefill_chunks_and_single_steps_have_the_same_gates(router: DomainRouter) -> None:
    ids = torch.cat([zipf_text(slot % SLOTS, 4096, seed=slot) for slot in range(8)])
    increments, steps = sums_and_steps(router, ids)

    prefill = faded_sums(increments, steps)
    sums, chunked = None, []
    for part, passed in zip(increments.split(5000, 1), steps.split(5000, 1), strict=True):
        chunked.append(faded_sums(part, passed, sums))
        sums = chunked[-1][:, -1]
    single, sums = [], torch.zeros(1, router.sums)
    for part, left in zip(increments.unbind(1), torch.exp2(-steps).float().unbind(1), strict=True):
        sums = sums * left + part  # as `faded_sums` of one position
        single.append(sums)

    expected = router.slot_gates(prefill)
    assert len(expected[0]) == 32_768
    torch.testing.assert_close(router.slot_gates(torch.cat(chunked, 1)), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(router.slot_gates(torch.stack(single, 1)), expected, rtol=0, atol=1e-4)
    exact = faded_sums(increments.double(), steps)
    torch.testing.assert_close(router.slot_gates(exact.float()), expected, rtol=0, atol=1e-4)


@settings(max_examples=20)
@given(seed=SEED, length=st.integers(2, 150), data=st.data())
@pytest.mark.parametrize("layer", [RouterCacheLayer, StaticRouterLayer])
def test_a_text_in_parts_has_its_gates_in_every_cache(
    layer: Any, seed: int, length: int, data: st.DataObject, router: DomainRouter
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (2, length), generator=generator)
    hidden = torch.randn(2, length, WIDTH, generator=generator)
    mask = torch.ones(2, length, dtype=torch.bool)
    cuts = sorted(data.draw(st.lists(st.integers(1, length - 1), max_size=5, unique=True)))
    cache, found = layer(), []

    for part, states in zip(ids.tensor_split(cuts, 1), hidden.tensor_split(cuts, 1), strict=True):
        is_text = router.text_mask(part, torch.ones_like(part, dtype=torch.bool))
        last = last_tokens(part, is_text, cache.last_tokens())
        increments = router.increments(part, states, is_text, last)
        found.append(router.slot_gates(cache.append(increments, last[:, 1:], router.steps(part, is_text))))

    torch.testing.assert_close(torch.cat(found, 1), router.text_gates(ids, hidden, mask), **CLOSE)


# --- padding and packing ---


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=3), left=st.booleans(), as_prompts=st.booleans())
def test_padding_on_either_side_changes_nothing_whatever_its_hidden_states_are(
    lengths: list[int], left: bool, as_prompts: bool, router: DomainRouter
) -> None:
    longest = max(lengths) + 3
    ids = torch.full((len(lengths), longest), 3)
    hidden, mask = torch.full((len(lengths), longest, WIDTH), torch.nan), torch.zeros(len(lengths), longest).bool()
    texts = [zipf_text(row, length, seed=length) for row, length in enumerate(lengths)]
    for row, words in enumerate(texts):
        words[::7] = STOP
        place = slice(longest - len(words), None) if left else slice(0, len(words))
        ids[row, place], hidden[row, place], mask[row, place] = words, embeddings()[words], True

    found = router.text_gates(ids, hidden, mask, as_prompts=as_prompts)

    assert found.isfinite().all()
    for row, words in enumerate(texts):
        torch.testing.assert_close(found[row, mask[row]], gates_of(router, words, as_prompt=as_prompts), **CLOSE)


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(1, 90), min_size=2, max_size=5), is_prompt=st.booleans())
def test_packed_texts_have_the_gates_of_each_alone(lengths: list[int], is_prompt: bool, router: DomainRouter) -> None:
    texts = [zipf_text(i % SLOTS, length, seed=i) for i, length in enumerate(lengths)]
    for words in texts:
        words[5::9] = STOP
    row = torch.cat(texts)[None]
    starts = text_starts(row.shape, torch.cat([torch.arange(length) for length in lengths])[None])
    assert starts is not None
    is_text = router.text_mask(row, torch.ones_like(row, dtype=torch.bool))
    last = last_tokens(row, is_text, None, starts)
    increments = router.increments(row, embeddings()[row], is_text, last)
    steps = router.steps(row, is_text, starts=starts, prompt_ends=text_ends(starts) if is_prompt else None)

    found = router.slot_gates(faded_sums(increments, steps))[0]

    expected = torch.cat([gates_of(router, words, as_prompt=is_prompt) for words in texts])
    torch.testing.assert_close(found, expected, **CLOSE)


# --- templates ---


def around(words: Tensor) -> Tensor:
    """A question with a template around it: markers before, between header and content, and after."""
    marker = torch.arange(WORDS, WORDS + MARKERS)
    return torch.cat([marker[:4], marker[1:3], words, marker[4:6], marker[:2], marker[6:]])


@settings(max_examples=30)
@given(slot=st.integers(0, SLOTS - 1), seed=SEED, length=st.integers(1, 80), as_prompt=st.booleans())
def test_a_question_has_the_same_gates_with_the_template_around_it(
    slot: int, seed: int, length: int, as_prompt: bool, router: DomainRouter
) -> None:
    words = zipf_text(slot, length, seed=seed % 10_000)
    words[4::11] = STOP

    found = gates_of(router, around(words), as_prompt=as_prompt)[6 : 6 + length]

    expected = gates_of(router, words, as_prompt=as_prompt)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # summed in other blocks
    # and so it has where the answer begins
    ends = [gates_of(router, ids, as_prompt=as_prompt)[-1] for ids in (around(words), words)]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-5)


def test_a_short_question_has_them_to_the_last_digit(router: DomainRouter) -> None:
    words = zipf_text(2, 20)

    chat, plain = gates_of(router, around(words)), gates_of(router, words)

    assert torch.allclose(chat[-1], plain[-1], rtol=0, atol=1e-7)


def test_the_bare_template_is_the_prior(router: DomainRouter) -> None:
    found = gates_of(router, around(torch.zeros(0, dtype=torch.int64)))

    torch.testing.assert_close(found, torch.tensor([0.4, 0.2, 0.2, 0.2]).expand_as(found))


# --- a change of field ---


def wait(router: DomainRouter, first: int, then: int, length: int) -> int:
    """How many tokens of the second field are read before it has most of the gate, and of the next 32 nearly all."""
    ids = torch.cat([zipf_text(first, length), zipf_text(then, 256, seed=5)])
    owns = gates_of(router, ids)[length:, then] > 0.5
    kept = owns[:-31] & (owns.float().unfold(0, 32, 1).mean(1) >= 0.9)
    return int(kept.nonzero()[0]) if kept.any() else 256


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 3), (0, 1), (3, 0)])
def test_another_field_takes_over_soon_however_long_the_first_was(first: int, then: int, router: DomainRouter) -> None:
    waits = [wait(router, first, then, length) for length in (64, 512, 4096)]

    assert max(waits) <= 64


def test_after_many_half_lives_the_length_of_what_was_read_makes_no_difference(router: DomainRouter) -> None:
    tail, then = zipf_text(1, 640), zipf_text(2, 64)
    length = 20 * int(HALF_LIFE)
    gates = [
        gates_of(router, torch.cat([zipf_text(3, more, seed=1), tail, then]))[-64 - length // 20 :]
        for more in (64, 512, 4096)
    ]

    for other in gates[1:]:
        torch.testing.assert_close(other, gates[0], rtol=0, atol=1e-5)


def test_without_fading_it_would_wait_longer_the_longer_it_has_read(statistics: list[DomainStatistics]) -> None:
    prior = torch.tensor([2.0, 1.0, 1.0, 1.0])
    plain = DomainRouter(statistics, prior=prior, temperatures=Temperatures(half_life=None), width=WIDTH)

    waits = [wait(plain, 1, 2, length) for length in (64, 512)]

    assert waits[1] > waits[0]
    assert waits[1] > 128


# --- prompts ---


def sentences(slot: int, count: int, *, words: int = 12) -> Tensor:
    parts = [torch.cat([zipf_text(slot, words, seed=i), torch.tensor([STOP])]) for i in range(count)]
    return torch.cat(parts)


@pytest.mark.parametrize("length", [6, 8, 12])
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1), (3, 2), (0, 3)])
def test_after_five_sentences_of_a_field_a_question_of_another_has_the_prompt(
    first: int, then: int, length: int, router: DomainRouter
) -> None:
    # words of the field itself: a question of words that all fields share is nobody's
    question = zipf_text(then, 400, seed=3)
    question = question[question >= COMMON][:length]
    prompt = torch.cat([sentences(first, 5), question])

    gates = gates_of(router, prompt, as_prompt=True)
    whole = whole_prompts(gates[None], torch.tensor([[len(prompt) - 1]]))[0]

    assert (whole[:, then] > 0.5).all()
    assert torch.equal(whole, whole[-1:].expand_as(whole))
    alone = gates_of(router, question)[-1]
    assert (whole[0, then] - alone[then]).abs() < 0.1
    assert gates_of(router, prompt)[-1, then] < whole[0, then] + 1e-6  # read causally it counts less


def test_too_few_words_after_a_sentence_do_not_make_a_prompt_forget_it(router: DomainRouter) -> None:
    context = sentences(1, 5)

    gates = gates_of(router, torch.cat([context, zipf_text(2, 400, seed=3)[:5]]), as_prompt=True)

    alone = gates_of(router, zipf_text(2, 400, seed=3)[:5])[-1]
    assert gates[-1, 1] > alone[1]


def test_a_full_stop_within_a_number_does_not_end_a_sentence(statistics: list[DomainStatistics]) -> None:
    digit = 45
    flags = torch.full((VOCABULARY,), OPENS, dtype=torch.uint8)
    flags[digit], flags[STOP] = 0, SENTENCE  # a digit follows without white space
    prior = torch.tensor([2.0, 1.0, 1.0, 1.0])
    roles = TokenRoles(flags)
    router = DomainRouter(statistics, prior=prior, temperatures=Temperatures(), width=WIDTH, roles=roles)
    number = torch.tensor([digit, STOP, digit])
    ids = torch.cat([zipf_text(1, 10), number, zipf_text(2, 10)])[None]
    ended = torch.cat([zipf_text(1, 10), number[:2], zipf_text(2, 11)])[None]
    end, is_text = torch.tensor([[22]]), torch.ones(1, 23, dtype=torch.bool)

    inside, after = (router.steps(row, is_text, prompt_ends=end) for row in (ids, ended))

    assert torch.equal(inside, router.steps(ids, is_text))
    assert after[0, 12] > 1


# --- any order and subset ---


@settings(max_examples=10)
@given(order=st.permutations(range(1, SLOTS)), seed=st.integers(0, 999))
def test_the_order_of_domains_changes_no_gate(
    order: list[int], seed: int, router: DomainRouter, statistics: list[DomainStatistics]
) -> None:
    prior, roles = torch.tensor([2.0, 1.0, 1.0, 1.0]), TokenRoles(router.flags, weights=router.weights)
    other = DomainRouter(
        [statistics[i] for i in (0, *order)], prior=prior, temperatures=Temperatures(), width=WIDTH, roles=roles
    )
    ids = zipf_text(seed % SLOTS, 120, seed=seed)

    torch.testing.assert_close(gates_of(other, ids), gates_of(router, ids)[:, [0, *order]], rtol=0, atol=1e-3)
