"""Prompts that are read as a whole: one gate for all of a prompt, causal afterwards."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from lorary.adapters.layer.attach import detach
from lorary.adapters.layer.routing import fixed_slots
from lorary.domains.errors import InputError

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def test_all_of_a_prompt_has_the_gates_of_its_end(base: Any, compose: Any, some_ids: Any, slot_gates: Any) -> None:
    composed, ids = compose(base), some_ids(2, 14)
    causal = slot_gates(composed, input_ids=ids)

    with composed.reading_prompts([5, 14]):
        found = slot_gates(composed, input_ids=ids)

    assert torch.equal(found[0, :5], causal[0, 4].expand(5, -1))
    assert torch.equal(found[0, 5:], causal[0, 5:])
    assert torch.equal(found[1], causal[1, -1].expand(14, -1))
    assert not torch.equal(found, causal)


def test_what_follows_a_prompt_is_causal(base: Any, compose: Any, some_ids: Any, slot_gates: Any) -> None:
    composed, ids, cache = compose(base), some_ids(2, 12), DynamicCache()
    causal = slot_gates(composed, input_ids=ids)

    with composed.reading_prompts():
        prompt = slot_gates(composed, input_ids=ids[:, :8], past_key_values=cache)
        answer = slot_gates(composed, input_ids=ids[:, 8:], past_key_values=cache)

    torch.testing.assert_close(prompt, causal[:, 7:8].expand(-1, 8, -1), **CLOSE)
    torch.testing.assert_close(answer, causal[:, 8:], **CLOSE)


def test_a_prompt_and_its_answer_in_one_pass_are_the_same_as_one_after_the_other(
    base: Any, compose: Any, some_ids: Any, logits: Any
) -> None:
    composed, ids, cache = compose(base), some_ids(2, 12), DynamicCache()

    with composed.reading_prompts():
        parts = [logits(composed, input_ids=chunk, past_key_values=cache) for chunk in ids.split([8, 1, 3], dim=1)]
    with composed.reading_prompts([8, 8]):
        whole = logits(composed, input_ids=ids)

    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_changes_nothing(base: Any, compose: Any, left: bool, prompts: Any, padded: Any, logits: Any) -> None:
    composed, batch = compose(base), padded(prompts(), left=left)
    mask = batch["attention_mask"]
    lengths = [mask.shape[1] if left else int(row.sum()) for row in mask]

    with composed.reading_prompts(lengths):
        found = logits(composed, **batch, position_ids=(mask.cumsum(1) - 1).clamp(min=0))

    for row, prompt in enumerate(prompts()):
        with composed.reading_prompts():
            expected = logits(composed, input_ids=prompt)[0]
        torch.testing.assert_close(found[row, mask[row].bool()], expected, **CLOSE)


@pytest.mark.parametrize(
    "how", [{"use_cache": False}, {"prompt_lookup_num_tokens": 3}], ids=["no-cache", "prompt-lookup"]
)
def test_a_prompt_of_known_length_ends_there_however_text_is_generated(
    base: Any, compose: Any, how: dict[str, Any], some_ids: Any, generated: Any, logits: Any
) -> None:
    composed, ids = compose(base, seed=1), some_ids(1, 4, seed=1).repeat(1, 3)
    with composed.reading_prompts():
        expected = generated(composed, input_ids=ids)
        of_unknown_length = generated(composed, input_ids=ids, **how)
        first = logits(composed, input_ids=expected[:, :13])

    with composed.reading_prompts(12):
        found = generated(composed, input_ids=ids, **how)
        assert not torch.allclose(logits(composed, input_ids=expected[:, :13]), first)  # so the length does matter

    assert torch.equal(found, expected)
    assert torch.equal(of_unknown_length, expected)


def test_a_length_serves_every_beam(base: Any, compose: Any, some_ids: Any, generated: Any) -> None:
    composed, ids = compose(base, seed=1), some_ids(2)
    beams = {"num_beams": 3, "num_return_sequences": 3, "use_cache": False}

    with composed.reading_prompts(12):
        found = generated(composed, input_ids=ids, **beams)
        expected = generated(composed, input_ids=ids, **beams | {"use_cache": True})

    assert torch.equal(found, expected)


def test_lengths_of_another_batch_are_refused(base: Any, compose: Any, some_ids: Any, logits: Any) -> None:
    composed = compose(base)

    with composed.reading_prompts([5, 5]), pytest.raises(InputError, match="do not fit") as caught:
        logits(composed, input_ids=some_ids(3))

    assert caught.value.cause == "there are 2 lengths for 3 rows"


def test_it_ends_with_the_context_and_leaves_fixed_gates_alone(
    base: Any, compose: Any, some_ids: Any, logits: Any
) -> None:
    composed, ids = compose(base), some_ids(1, 9)
    before = logits(composed, input_ids=ids)

    with fixed_slots(composed, {"legal": 1.0}):
        plain = logits(composed, input_ids=ids)
        with composed.reading_prompts():
            assert torch.equal(logits(composed, input_ids=ids), plain)

    assert torch.equal(logits(composed, input_ids=ids), before)
    assert not hasattr(detach(composed), "reading_prompts")
