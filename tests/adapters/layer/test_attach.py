"""Composed models against their base, over many families: the same API, and nothing of the base is touched."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from lorary.adapters.bank import new_bank
from lorary.adapters.layer.attach import attach, copy_sharing_parameters, detach, trained_bank
from lorary.adapters.layer.fused import FusedLinear
from lorary.adapters.layer.routing import fixed_slots, routing_of
from lorary.adapters.layer.stack import Stack
from lorary.domains.base_model import find_layout
from lorary.domains.errors import InputError


def test_experts_that_add_zero_leave_the_logits_exactly_as_they_are(
    any_base: Any, compose: Any, some_ids: Any, logits: Any
) -> None:
    composed = compose(any_base, zero_B=True)

    assert torch.equal(logits(composed, input_ids=some_ids(2)), logits(any_base, input_ids=some_ids(2)))


def test_random_experts_change_the_logits(any_base: Any, compose: Any, some_ids: Any, logits: Any) -> None:
    composed = compose(any_base)

    difference = logits(composed, input_ids=some_ids(2)) - logits(any_base, input_ids=some_ids(2))
    assert difference.abs().amax(-1).min() > 1e-3


def test_a_fresh_bank_changes_nothing(
    any_base: Any, random_router: Any, bank_config: Any, some_ids: Any, logits: Any
) -> None:
    bank = new_bank(any_base, find_layout(any_base), bank_config(), generator=torch.Generator().manual_seed(0))
    stack = Stack(names=("general",), banks=(bank,), trainable=True)

    composed = attach(any_base, stack, router=random_router(any_base, slots=1))

    assert torch.equal(logits(composed, input_ids=some_ids()), logits(any_base, input_ids=some_ids()))


def test_a_slot_with_gate_zero_takes_no_part(base: Any, random_stack: Any, some_ids: Any, logits: Any) -> None:
    three = random_stack(base)
    one = Stack(names=three.names[:1], banks=three.banks[:1])

    with_all = attach(base, three, router=None, fixed=torch.tensor([1.0, 0.0, 0.0]))
    alone = attach(base, one, router=None, fixed=torch.tensor([1.0]))

    torch.testing.assert_close(logits(with_all, input_ids=some_ids()), logits(alone, input_ids=some_ids()))


def test_a_static_composition_uses_the_mean_gates(
    base: Any, random_stack: Any, some_ids: Any, layer_gates: Any
) -> None:
    stack = random_stack(base, static=True)

    composed = attach(base, stack, router=None, fixed=torch.tensor([0.2, 0.3, 0.5]))
    seen = layer_gates(composed, input_ids=some_ids())

    for index in stack.layers:
        weights = zip((0.2, 0.3, 0.5), stack.banks, strict=True)
        expected = torch.cat([weight * bank.layers[index].static_gate() for weight, bank in weights])
        (found,) = seen[index]
        torch.testing.assert_close(found.gates, expected.expand_as(found.gates))


def test_neither_router_nor_fixed_gates_is_refused(base: Any, random_stack: Any) -> None:
    with pytest.raises(InputError, match="router or fixed"):
        attach(base, random_stack(base), router=None)


def test_bfloat16_base_stays_bfloat16_and_near_float32(
    make_base: Any, compose: Any, some_ids: Any, logits: Any
) -> None:
    exact, rounded = make_base("llama"), make_base("llama", dtype=torch.bfloat16)

    found = logits(compose(rounded), input_ids=some_ids())
    expected = logits(compose(exact), input_ids=some_ids())

    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_bfloat16_base_generates_and_routes_in_float32(
    make_base: Any, compose: Any, some_ids: Any, generated: Any, slot_gates: Any
) -> None:
    composed = compose(make_base("llama", dtype=torch.bfloat16))

    found = generated(composed, input_ids=some_ids(2))

    assert found.shape == (2, 20)
    assert slot_gates(composed, input_ids=found).dtype == torch.float32


# --- the base stays as it is ---


def test_base_keeps_its_bytes_and_outputs_through_attach_training_generation_and_detach(
    any_base: Any, compose: Any, digest: Any, some_ids: Any, logits: Any, generated: Any
) -> None:
    before, expected = digest(any_base), logits(any_base, input_ids=some_ids(2))

    composed = compose(any_base, trainable=True).train()
    composed(input_ids=some_ids(2), labels=some_ids(2)).loss.backward()
    assert torch.equal(logits(any_base, input_ids=some_ids(2)), expected)
    generated(composed.eval(), input_ids=some_ids())
    detach(composed)

    assert digest(any_base) == before
    assert torch.equal(logits(any_base, input_ids=some_ids(2)), expected)
    assert not any_base.training
    assert all(parameter.grad is None for parameter in any_base.parameters())
    assert not any(isinstance(module, FusedLinear) for module in any_base.modules())


def test_detached_model_is_the_base_again(
    any_base: Any, compose: Any, digest: Any, some_ids: Any, logits: Any, generated: Any
) -> None:
    composed = compose(any_base)
    logits(composed, input_ids=some_ids())

    plain = detach(composed)

    assert plain is composed
    assert torch.equal(logits(plain, input_ids=some_ids()), logits(any_base, input_ids=some_ids()))
    assert torch.equal(generated(plain, input_ids=some_ids()), generated(any_base, input_ids=some_ids()))
    assert digest(plain) == digest(any_base)
    assert [type(module) for module in plain.modules()] == [type(module) for module in any_base.modules()]
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in plain.modules())
    with pytest.raises(InputError, match="not composed"):
        routing_of(plain)


def test_composed_model_shares_the_memory_of_every_parameter_of_the_base(any_base: Any, compose: Any) -> None:
    theirs = {p.data_ptr() for p in any_base.parameters()}

    assert {p.data_ptr() for p in compose(any_base).parameters()} == theirs
    assert {p.data_ptr() for p in copy_sharing_parameters(any_base).parameters()} == theirs


def test_two_composed_models_over_one_base_see_nothing_of_each_other(
    any_base: Any, compose: Any, some_ids: Any, logits: Any
) -> None:
    first, second = compose(any_base, seed=1), compose(any_base, seed=2, names=("general", "code"))
    ids = some_ids(1, 10)
    models = (first, second, any_base)
    expected = [logits(model, input_ids=ids) for model in models]

    caches = [DynamicCache(config=any_base.config) for _ in models]
    steps: list[list[Any]] = [[], [], []]
    for token in ids.split(1, dim=1):
        for i, model in enumerate(models):
            steps[i].append(logits(model, input_ids=token, past_key_values=caches[i]))

    for found, whole in zip(steps, expected, strict=True):
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_composed_model_is_copied_with_its_routing(base: Any, compose: Any, some_ids: Any, logits: Any) -> None:
    composed = compose(base, trainable=True)
    composed(input_ids=some_ids(), labels=some_ids()).loss.backward()

    twin = copy.deepcopy(composed)
    expected = logits(composed, input_ids=some_ids())

    assert twin.routing is not composed.routing
    assert torch.equal(logits(twin, input_ids=some_ids()), expected)
    with torch.no_grad():
        for parameter in composed.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, input_ids=some_ids()), expected)


def test_the_detached_model_is_saved_and_loads_as_the_base(
    any_base: Any, compose: Any, tmp_path: Any, digest: Any
) -> None:
    detach(compose(any_base)).save_pretrained(tmp_path / "plain")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")

    assert digest(loaded) == digest(any_base)


# --- fixed slots, and what is refused ---


def test_embeddings_cannot_be_routed_but_fixed_gates_take_them(
    any_base: Any, compose: Any, some_ids: Any, logits: Any
) -> None:
    composed = compose(any_base)
    embedded = any_base.get_input_embeddings()(some_ids())

    with pytest.raises(InputError, match="input tokens"):
        logits(composed, inputs_embeds=embedded)
    with fixed_slots(composed, {"general": 0.5, "legal": 0.5}):
        by_embedding = logits(composed, inputs_embeds=embedded)
        by_token = logits(composed, input_ids=some_ids())

    assert by_embedding.shape == (1, 12, 64)
    if "gemma" not in any_base.config.model_type:  # there the embedding is scaled inside, or not, by version
        torch.testing.assert_close(by_embedding, by_token, rtol=0, atol=0)


def test_a_mask_of_every_pair_of_tokens_is_refused(base: Any, compose: Any, some_ids: Any, logits: Any) -> None:
    composed = compose(base)
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]

    with pytest.raises(InputError, match="attention mask"):
        logits(composed, input_ids=some_ids(), attention_mask=mask)


def test_a_plain_model_has_no_routing(base: Any) -> None:
    for function in (routing_of, detach, trained_bank):
        with pytest.raises(InputError, match="not composed"):
            function(base)


def test_fixed_slots_hold_while_the_context_is_open_and_go_with_it(
    base: Any, compose: Any, some_ids: Any, logits: Any, slot_gates: Any
) -> None:
    composed = compose(base)
    routed = logits(composed, input_ids=some_ids())

    with fixed_slots(composed, {"medicine": 1.0}):
        inside = logits(composed, input_ids=some_ids())
        gates = slot_gates(composed, input_ids=some_ids())
        with fixed_slots(composed, {"legal": 0.5, "general": 0.5}):
            assert slot_gates(composed, input_ids=some_ids())[0, 0].tolist() == [0.5, 0.0, 0.5]
        assert torch.equal(logits(composed, input_ids=some_ids()), inside)

    assert gates.tolist() == [[[0.0, 1.0, 0.0]] * 12]
    assert not torch.allclose(inside, routed)
    assert torch.equal(logits(composed, input_ids=some_ids()), routed)


def test_fixed_slots_are_restored_after_an_error(base: Any, compose: Any) -> None:
    composed = compose(base)

    with pytest.raises(KeyError), fixed_slots(composed, {"medicine": 1.0}):
        raise KeyError

    assert composed.routing.fixed_here is None


def test_a_fixed_slot_that_is_not_there_is_refused(base: Any, compose: Any) -> None:
    with pytest.raises(InputError, match="'lgeal'"), fixed_slots(compose(base), {"lgeal": 1.0}):
        pass


def test_fixed_slots_of_zero_are_the_base(any_base: Any, compose: Any, some_ids: Any, logits: Any) -> None:
    composed = compose(any_base)

    with fixed_slots(composed, {}):
        found = logits(composed, input_ids=some_ids())

    assert torch.equal(found, logits(any_base, input_ids=some_ids()))
