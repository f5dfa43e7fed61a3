"""Packs of older editions of the router: opened, routed as they were, and never mixed with newer ones unseen."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.domains.data.blocks import encode
from lorary.domains.errors import IncompatibleError
from lorary.domains.statistics.measure import measure_statistics
from lorary.registry import Registry
from lorary.registry.measure.held_out import read_domain_data, spec_of
from lorary.registry.pack.pack import ROUTER_CONFIG, SECOND_ROUTER_SCHEMA, one_edition, pack_files, read_pack
from lorary.registry.store.strict_json import canonical_json, parse_json


@pytest.fixture
def registry(cooking_store: Path, fresh_copy: Callable[[Path], Registry]) -> Registry:
    """KP and `cooking`, free to be altered."""
    return fresh_copy(cooking_store)


@pytest.fixture
def make_older(registry: Registry, rewrite: Callable[..., Any]) -> Callable[[str], None]:
    """`make_older(name)` makes a version one of the edition in which all tokens' features weigh the same."""

    def change(data: bytes) -> bytes:
        config = parse_json(data, source="test")
        del config["common_tokens"]
        return canonical_json(config | {"schema": SECOND_ROUTER_SCHEMA})

    return lambda name: rewrite(registry.store, name, ROUTER_CONFIG, change)


def weights_of(registry: Registry, spec: str) -> torch.Tensor:
    model: Any = registry.compose(spec)
    return model.routing.router.weights


def test_common_tokens_weigh_little_in_packs_of_now(registry: Registry) -> None:
    expected: Any = registry.base.roles.weights

    assert expected.min() < 0.1
    assert torch.equal(weights_of(registry, "cooking"), expected)


@pytest.mark.parametrize("older", [("general",), ("cooking",), ("general", "cooking")])
def test_one_older_pack_makes_all_tokens_weigh_the_same(
    older: tuple[str, ...], registry: Registry, make_older: Callable[[str], None]
) -> None:
    for name in older:
        make_older(name)

    assert torch.equal(weights_of(registry, "cooking"), torch.ones(len(registry.base.roles.flags)))


def test_an_older_pack_is_written_again_as_it_was(registry: Registry, make_older: Callable[[str], None]) -> None:
    make_older("cooking")
    manifest = registry.show("cooking")

    files = pack_files(
        read_pack(registry.store, manifest), layout=registry.base.layout, base_id=manifest.base.id, revision=None
    )

    assert files[ROUTER_CONFIG][0] == registry.store.read(manifest, ROUTER_CONFIG)


def test_beside_an_older_kp_bank_new_domains_are_measured_for_its_edition(
    registry: Registry, make_older: Callable[[str], None], texts: dict[str, Path], short_run: Callable[..., Any]
) -> None:
    make_older("general")

    registry.add_domain("sailing", data=[texts["sailing"]], **short_run())

    pack, base = read_pack(registry.store, registry.show("sailing")), registry.base
    rows = read_domain_data(spec_of("sailing", [texts["sailing"]]), [texts["sailing"]]).train
    expected = measure_statistics(
        base.model,
        base.layout,
        [encode(row, base.tokenizer) for row in rows],
        layer=pack.feature_layer,
        roles=replace(base.roles, weights=None),
    )
    assert not pack.temperatures.is_weighted
    torch.testing.assert_close(pack.statistics.feature_sum, expected.feature_sum)


def test_a_domain_keeps_its_edition_when_it_is_retrained(
    registry: Registry, make_older: Callable[[str], None], texts: dict[str, Path], short_run: Callable[..., Any]
) -> None:
    make_older("cooking")

    registry.retrain("cooking", data=[texts["sailing"]], training=short_run()["training"])

    newest = registry.show("cooking@2")
    assert not read_pack(registry.store, newest).temperatures.is_weighted


def test_common_tokens_that_were_counted_in_other_text_are_refused(
    registry: Registry, rewrite: Callable[..., Any]
) -> None:
    def change(data: bytes) -> bytes:
        config = parse_json(data, source="test")
        return canonical_json(config | {"common_tokens": config["common_tokens"] | {"text": "sha256:" + "0" * 64}})

    rewrite(registry.store, "cooking", ROUTER_CONFIG, change)

    with pytest.raises(IncompatibleError, match="router of cooking@1 is incompatible"):
        read_pack(registry.store, registry.show("cooking"))


def test_packs_of_one_edition_stay_as_they_are(whole: Registry) -> None:
    packs = [read_pack(whole.store, whole.show(name)) for name in ("general", "cooking")]

    assert [one.temperatures for one in one_edition(packs, whole.base.layout.width)] == [p.temperatures for p in packs]
