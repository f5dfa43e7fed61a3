"""Composed models: exact, in any order, and unchanged by later additions."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.adapters.bank import ExpertBank
from lorary.adapters.layer.active import SLOT_THRESHOLD
from lorary.adapters.layer.routing import recording_routes, routing_of
from lorary.adapters.router.router import Temperatures
from lorary.domains.errors import InputError, IntegrityError
from lorary.registry import Registry
from lorary.registry.compose.build import base_router, build_router, joint_temperatures
from lorary.registry.compose.plan import prior_shares
from lorary.registry.learn.proof import digest_of_tensors
from lorary.registry.pack.pack import DomainPack, read_pack


@pytest.mark.parametrize("static", [False, True])
def test_adding_a_domain_changes_no_logit_of_the_older_ones(
    static: bool, cooking_store: Path, whole: Registry, logits_of: Any
) -> None:
    before = logits_of(Registry.open(cooking_store).compose("cooking", static=static))

    assert torch.equal(logits_of(whole.compose("cooking", static=static)), before)


def test_adding_a_domain_changes_no_logit_of_the_general_bank(kp_store: Path, whole: Registry, logits_of: Any) -> None:
    assert torch.equal(logits_of(whole.compose("general")), logits_of(Registry.open(kp_store).compose("general")))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cooking+sailing", "sailing+cooking"),
        ("cooking+sailing", "general+sailing+cooking@1"),
        ("cooking:0.3+sailing:0.7", "sailing:0.7+cooking:0.3"),
        ("cooking:1+sailing:3", "sailing:3+cooking"),
    ],
)
def test_the_order_of_terms_changes_no_logit(one: str, other: str, whole: Registry, logits_of: Any) -> None:
    assert torch.equal(logits_of(whole.compose(one)), logits_of(whole.compose(other)))


def test_weights_do_change_the_logits(whole: Registry, logits_of: Any) -> None:
    plain = logits_of(whole.compose("cooking+sailing"))

    assert not torch.equal(logits_of(whole.compose("cooking:9+sailing:1")), plain)
    assert not torch.equal(logits_of(whole.compose("cooking+sailing", static=True)), plain)


def test_a_static_gate_of_zero_leaves_the_domain_out(whole: Registry, logits_of: Any) -> None:
    torch.testing.assert_close(
        logits_of(whole.compose("cooking:1+sailing", static=True)), logits_of(whole.compose("cooking", static=True))
    )


def test_composed_models_do_not_affect_each_other(whole: Registry, logits_of: Any) -> None:
    first: Any = whole.compose("cooking")
    before = logits_of(first)

    second: Any = whole.compose("sailing")
    logits_of(second)

    assert torch.equal(logits_of(first), before)
    assert first.get_input_embeddings().weight.data_ptr() == second.get_input_embeddings().weight.data_ptr()


def test_composing_twice_gives_the_same_model(whole: Registry, logits_of: Any) -> None:
    models = [whole.compose("cooking+sailing") for _ in range(2)]

    assert torch.equal(*(logits_of(model) for model in models))


def test_the_slot_gates_sum_to_one_and_prefer_general_before_any_text(whole: Registry, logits_of: Any) -> None:
    model = whole.compose("cooking+sailing")
    with recording_routes(model) as routes:
        logits_of(model)

    gate = routes[0].slot_gate
    # gates below the threshold become 0; the others are not renormalised
    torch.testing.assert_close(gate.sum(-1), torch.ones(gate.shape[:2]), atol=3 * SLOT_THRESHOLD, rtol=0)


def test_no_composed_tensor_needs_a_gradient(whole: Registry) -> None:
    model = whole.compose("cooking+sailing")

    assert not any(tensor.requires_grad for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("static", [False, True])
def test_a_composed_model_has_its_plan(static: bool, whole: Registry, tmp_path: Path) -> None:
    model: Any = whole.compose("cooking", static=static)
    again: Any = whole.compose("cooking", static=static)  # from the cache
    saved: Any = whole.compose(str(whole.save("cooking", tmp_path / "out", static=static)))

    plan = whole.plan("cooking", static=static)
    assert model.composition == again.composition == saved.composition == plan
    assert "cooking@1" in repr(model.composition)
    assert not hasattr(whole.base.model, "composition")


@pytest.fixture
def packs(whole: Registry) -> list[DomainPack]:
    return [read_pack(whole.store, whole.show(name)) for name in ("general", "cooking", "sailing")]


def test_the_router_of_a_subset_does_not_depend_on_other_domains(packs: list[DomainPack], whole: Registry) -> None:
    composed = routing_of(whole.compose("sailing")).router
    shares = torch.tensor(list(prior_shares({"general": None, "sailing": None}).values()))
    alone = base_router([packs[0], packs[2]], shares, whole.base)

    assert composed is not None
    assert digest_of_tensors(composed.named_buffers()) == digest_of_tensors(alone.named_buffers())


def test_joint_temperatures_are_means_in_any_order(packs: list[DomainPack]) -> None:

    first = replace(packs[1], temperatures=Temperatures(token=0.1, hidden=0.5))
    second = replace(packs[2], temperatures=Temperatures(token=0.4, hidden=0.1))

    assert joint_temperatures([first, second]) == joint_temperatures([second, first])
    assert joint_temperatures([first, second]).token == pytest.approx(math.sqrt(0.04))
    assert joint_temperatures([first, second]).hidden == pytest.approx(0.3)
    assert joint_temperatures([first]).token == pytest.approx(0.1)
    assert joint_temperatures([]) == Temperatures()


def test_packs_with_different_feature_layers_are_not_routed_together(packs: list[DomainPack]) -> None:

    with pytest.raises(IntegrityError, match="together"):
        build_router([packs[0], replace(packs[1], feature_layer=2)], torch.ones(2), width=32, roles=None)


def test_experts_below_the_feature_layer_disable_hidden_evidence(packs: list[DomainPack]) -> None:
    low = ExpertBank(layers={0: packs[2].bank.layers[packs[2].bank.first_layer]})
    shares = torch.tensor([0.7, 0.1, 0.2])

    router = build_router([*packs[:2], replace(packs[2], bank=low)], shares, width=32, roles=None)

    ids, mask = torch.randint(6, 300, (1, 16), generator=torch.Generator().manual_seed(0)), torch.ones(1, 16).bool()
    found = [router.slot_gates(router.increments(ids, hidden, mask).cumsum(1)) for hidden in torch.randn(2, 1, 16, 32)]
    assert torch.equal(*found)
    assert (found[0][0, -1] - shares).abs().max() > 0.01


def test_a_cache_goes_on_only_in_the_composition_that_filled_it(whole: Registry) -> None:
    ids = torch.randint(5, 200, (1, 8), generator=torch.Generator().manual_seed(0))
    models: list[Any] = [whole.compose(text) for text in ("cooking", "sailing", "cooking:2+general:1", "cooking")]
    models.insert(1, whole.compose("cooking", static=True))
    filled = models[0](ids[:, :7], use_cache=True).past_key_values

    for other in models[1:4]:
        with pytest.raises(InputError, match="another composition"):
            other(ids[:, 7:], past_key_values=filled)
    again = models[4](ids[:, 7:], past_key_values=filled).logits

    torch.testing.assert_close(again, models[0](ids).logits[:, -1:], rtol=1e-4, atol=1e-4)
