"""Composed models generate as their base does, and their gates do not depend on how text is cut, padded or batched."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from lorary.adapters.layer.routing import fixed_slots, recording_routes
from lorary.domains.errors import InputError

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def test_cached_generation_equals_generation_without_cache(
    any_base: Any, compose: Any, some_ids: Any, generated: Any
) -> None:
    composed = compose(any_base)

    for beams in (1, 3):
        with_cache = generated(composed, input_ids=some_ids(2), num_beams=beams)
        without = generated(composed, input_ids=some_ids(2), num_beams=beams, use_cache=False)
        assert torch.equal(with_cache, without), f"{beams} beams"


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beam-search"])
def test_a_left_padded_batch_generates_what_each_text_does_alone(
    any_base: Any, compose: Any, beams: int, prompts: Any, padded: Any, generated: Any
) -> None:
    composed = compose(any_base)

    together = generated(composed, **padded(prompts(), left=True), num_beams=beams)

    for row, prompt in enumerate(prompts()):
        alone = generated(composed, input_ids=prompt, num_beams=beams)
        assert torch.equal(together[row, -8:], alone[0, -8:]), f"prompt {row}"


def test_sampling_with_the_same_seed_gives_the_same_text(
    any_base: Any, compose: Any, prompts: Any, padded: Any, generated: Any
) -> None:
    composed, inert = compose(any_base), compose(any_base, zero_B=True)

    def sample(model: Any) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return generated(model, **padded(prompts(), left=True), do_sample=True)

    assert torch.equal(sample(composed), sample(composed))
    assert torch.equal(sample(inert), sample(any_base))


def test_several_return_sequences_continue_the_same_routing(
    base: Any, compose: Any, some_ids: Any, generated: Any
) -> None:
    composed = compose(base)

    beams = generated(composed, input_ids=some_ids(2), num_beams=3, num_return_sequences=3)
    best = generated(composed, input_ids=some_ids(2), num_beams=3)

    assert beams.shape[0] == 6
    assert torch.equal(beams[::3], best)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert generated(composed, input_ids=some_ids(2), do_sample=True, num_return_sequences=3).shape[0] == 6


def test_prompt_lookup_decoding_gives_the_greedy_text(
    any_base: Any, compose: Any, some_ids: Any, generated: Any
) -> None:
    composed = compose(any_base)
    repeating = some_ids(1, 4).repeat(1, 4)

    found = generated(composed, input_ids=repeating, prompt_lookup_num_tokens=3, max_new_tokens=16)

    assert torch.equal(found, generated(composed, input_ids=repeating, max_new_tokens=16))


@pytest.mark.parametrize("composed_assists", [False, True], ids=["base-assists", "composed-assists"])
def test_assisted_decoding_gives_the_greedy_text(
    base: Any, compose: Any, composed_assists: bool, some_ids: Any, generated: Any
) -> None:
    composed = compose(base)
    model, assistant = (base, composed) if composed_assists else (composed, base)

    found = generated(model, input_ids=some_ids(), assistant_model=assistant, max_new_tokens=16)

    assert torch.equal(found, generated(model, input_ids=some_ids(), max_new_tokens=16))


@pytest.mark.parametrize("left", [False, True], ids=["plain", "padded"])
def test_a_static_cache_gives_the_same_text(
    any_base: Any, compose: Any, left: bool, some_ids: Any, prompts: Any, padded: Any, generated: Any
) -> None:
    composed = compose(any_base)
    inputs = padded(prompts(), left=True) if left else {"input_ids": some_ids(2)}

    for context in (nullcontext(), composed.reading_prompts()):
        with context:
            with recording_routes(composed) as gates:
                found = generated(composed, **inputs, cache_implementation="static")
            with recording_routes(composed) as expected_gates:
                expected = generated(composed, **inputs)

        assert torch.equal(found, expected)
        for one, other in zip(gates, expected_gates, strict=True):
            torch.testing.assert_close(one, other)


def test_a_static_cache_serves_fixed_gates(
    any_base: Any, compose: Any, prompts: Any, padded: Any, generated: Any
) -> None:
    composed = compose(any_base)

    with fixed_slots(composed, {"medicine": 0.7, "general": 0.3}):
        found = generated(composed, **padded(prompts(), left=True), cache_implementation="static")
        expected = generated(composed, **padded(prompts(), left=True))

    assert torch.equal(found, expected)


# --- one text, however it is cut ---


def static_cache(config: Any) -> StaticCache:
    return StaticCache(config=config, max_cache_len=20)


CACHES = pytest.mark.parametrize("make_cache", [lambda config: DynamicCache(config=config), static_cache])


@CACHES
@pytest.mark.parametrize("chunks", [[1] * 14, [5, 1, 6, 2]], ids=["token-by-token", "chunked-prefill"])
def test_logits_and_gates_do_not_depend_on_how_the_text_is_cut(
    any_base: Any, compose: Any, chunks: list[int], make_cache: Any, some_ids: Any, logits: Any, slot_gates: Any
) -> None:
    composed, ids = compose(any_base), some_ids(2, 14)
    whole, gates = logits(composed, input_ids=ids), slot_gates(composed, input_ids=ids)

    cache = make_cache(any_base.config)
    with recording_routes(composed) as routes:
        parts = [logits(composed, input_ids=chunk, past_key_values=cache) for chunk in ids.split(chunks, dim=1)]

    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)
    torch.testing.assert_close(torch.cat([route.slot_gate for route in routes], 1), gates, **CLOSE)
    assert [route.past for route in routes] == [sum(chunks[:i]) for i in range(len(chunks))]
    assert (gates[:, -1] - gates[:, 0]).abs().max() > 0.05  # the router does move


@CACHES
@pytest.mark.parametrize("first_layer", [0, 2, 3])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_decoding_continues_the_routing_whichever_layer_has_the_first_experts(
    family: str, first_layer: int, make_cache: Any, make_base: Any, compose: Any, some_ids: Any, logits: Any
) -> None:
    composed, ids = compose(make_base(family), first_layer=first_layer), some_ids(2, 14)

    cache = make_cache(composed.config)
    parts = [logits(composed, input_ids=chunk, past_key_values=cache) for chunk in ids.split([9, 1, 4], dim=1)]

    torch.testing.assert_close(torch.cat(parts, 1), logits(composed, input_ids=ids), **CLOSE)


def test_a_cache_without_layers_of_its_own_works_as_well(base: Any, compose: Any, some_ids: Any, logits: Any) -> None:
    composed, ids = compose(base), some_ids(2, 14)
    cache = DynamicCache()

    parts = [logits(composed, input_ids=chunk, past_key_values=cache) for chunk in ids.split([9, 5], dim=1)]

    torch.testing.assert_close(torch.cat(parts, 1), logits(composed, input_ids=ids), **CLOSE)
    assert len(cache.layers) == 4 + 1


@CACHES
@pytest.mark.parametrize("as_a_whole", [False, True], ids=["causal", "prompt"])
def test_a_cache_serves_again_after_it_is_reset(
    base: Any, compose: Any, make_cache: Any, as_a_whole: bool, some_ids: Any, logits: Any
) -> None:
    composed, cache = compose(base), make_cache(base.config)
    with composed.reading_prompts() if as_a_whole else nullcontext():
        first = logits(composed, input_ids=some_ids(), past_key_values=cache)
        logits(composed, input_ids=some_ids()[:, :3], past_key_values=cache)
        cache.reset()

        again = logits(composed, input_ids=some_ids(), past_key_values=cache)

    assert torch.equal(again, first)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_changes_neither_logits_nor_gates_of_real_tokens(
    any_base: Any, compose: Any, left: bool, prompts: Any, padded: Any, logits: Any, slot_gates: Any
) -> None:
    composed, batch = compose(any_base), padded(prompts(), left=left)

    inputs = batch | {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    found, gates = logits(composed, **inputs), slot_gates(composed, **inputs)

    for row, prompt in enumerate(prompts()):
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(found[row, real], logits(composed, input_ids=prompt)[0], **CLOSE)
        torch.testing.assert_close(gates[row, real], slot_gates(composed, input_ids=prompt)[0], **CLOSE)


def test_positional_arguments_are_understood(base: Any, compose: Any, prompts: Any, padded: Any) -> None:
    composed, batch = compose(base), padded(prompts(), left=True)

    with torch.no_grad(), recording_routes(composed) as routes:
        composed.model(batch["input_ids"], batch["attention_mask"])
        composed.model(**batch)

    assert torch.equal(routes[0].slot_gate, routes[1].slot_gate)


def test_slot_gates_are_causal(any_base: Any, compose: Any, some_ids: Any, slot_gates: Any) -> None:
    composed, ids = compose(any_base), some_ids(2, 14)
    changed = torch.cat([ids[:, :9], some_ids(2, 5, seed=9)], dim=1)

    before, after = slot_gates(composed, input_ids=ids), slot_gates(composed, input_ids=changed)

    torch.testing.assert_close(after[:, :9], before[:, :9])
    assert not torch.allclose(after[:, 9:], before[:, 9:])


def test_recording_collects_the_gates_of_every_forward(
    base: Any, compose: Any, some_ids: Any, slot_gates: Any, generated: Any
) -> None:
    composed = compose(base)

    with recording_routes(composed) as routes:
        text = generated(composed, input_ids=some_ids())
    expected = slot_gates(composed, input_ids=text)

    torch.testing.assert_close(torch.cat([route.slot_gate for route in routes], 1), expected[:, :-1], **CLOSE)


# --- caches of others ---


@pytest.mark.parametrize("first_layer", [0, 1, 2])
def test_a_cache_that_the_base_filled_is_refused(
    any_base: Any, compose: Any, first_layer: int, some_ids: Any, logits: Any
) -> None:
    composed = compose(any_base, first_layer=first_layer)
    for length in (3, 12):
        cache = DynamicCache(config=any_base.config)
        logits(any_base, input_ids=some_ids(1, length), past_key_values=cache)

        with pytest.raises(InputError, match="another model"):
            logits(composed, input_ids=some_ids(1, 3), past_key_values=cache)


def test_a_cache_that_another_composition_filled_is_refused(
    base: Any, compose: Any, some_ids: Any, logits: Any
) -> None:
    first, second = compose(base), compose(base, names=("general", "code"))
    cache = DynamicCache(config=base.config)
    logits(first, input_ids=some_ids(), past_key_values=cache)

    with pytest.raises(InputError, match="another composition"):
        logits(second, input_ids=some_ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize("how", ["base", "fixed"])
def test_a_cache_that_others_continued_is_refused(
    base: Any, compose: Any, how: str, some_ids: Any, logits: Any
) -> None:
    composed, cache = compose(base), DynamicCache(config=base.config)
    logits(composed, input_ids=some_ids(), past_key_values=cache)
    if how == "base":
        logits(base, input_ids=some_ids(1, 2), past_key_values=cache)
    else:
        with fixed_slots(composed, {"legal": 1.0}):
            logits(composed, input_ids=some_ids(1, 2), past_key_values=cache)

    with pytest.raises(InputError, match="another model"):
        logits(composed, input_ids=some_ids(1, 1), past_key_values=cache)
