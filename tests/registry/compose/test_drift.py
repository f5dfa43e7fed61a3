"""Routing drift, computed from statistics alone."""

import math
from dataclasses import fields, replace

import pytest
import torch

from lorary.adapters.bank import ExpertBank
from lorary.adapters.router.router import Temperatures
from lorary.registry import Registry
from lorary.registry.compose.drift import Drift, measure_drift
from lorary.registry.pack.pack import DomainPack, read_pack

WIDTH = 32


@pytest.fixture(scope="module")
def packs(whole: Registry) -> dict[str, DomainPack]:
    return {name: read_pack(whole.store, whole.show(name)) for name in ("general", "cooking", "sailing")}


def test_the_first_domain_causes_no_drift(packs: dict[str, DomainPack]) -> None:
    assert measure_drift(packs["general"], {}, packs["cooking"], width=WIDTH) == Drift(0.0, 0, 0.0, 0)


def test_a_distinct_domain_takes_no_text_away(packs: dict[str, DomainPack]) -> None:
    drift = measure_drift(packs["general"], {"cooking": packs["cooking"]}, packs["sailing"], width=WIDTH)

    assert drift.domains == 1
    assert drift.top1_flips == 0
    assert 0 <= drift.newcomer_share < 0.5
    assert math.copysign(1, drift.mean_kl) == 1  # never -0.0


def test_a_copy_of_a_domain_takes_half_of_its_text(packs: dict[str, DomainPack]) -> None:
    others = {"cooking": packs["cooking"], "sailing": packs["sailing"]}
    distinct = measure_drift(packs["general"], {"cooking": packs["cooking"]}, packs["sailing"], width=WIDTH)

    drift = measure_drift(packs["general"], others, packs["cooking"], width=WIDTH)

    assert drift.domains == 2
    assert drift.newcomer_share > 2 * distinct.newcomer_share
    assert drift.newcomer_share <= 0.5
    assert drift.mean_kl > 0


def test_a_copy_of_the_general_bank_does_not_win_over_it(packs: dict[str, DomainPack]) -> None:
    copy = replace(packs["general"], temperatures=packs["cooking"].temperatures)

    # it has as much evidence as KP, but KP has the larger prior
    drift = measure_drift(packs["general"], {"cooking": packs["cooking"]}, copy, width=WIDTH)

    assert drift.top1_flips == 0
    assert drift.newcomer_share > 0.1


def test_drift_grows_with_the_similarity_of_the_new_domain(packs: dict[str, DomainPack]) -> None:
    others = {"cooking": packs["cooking"]}
    mixed = replace(packs["sailing"], statistics=packs["sailing"].statistics + packs["cooking"].statistics)

    shares = [
        measure_drift(packs["general"], others, pack, width=WIDTH).newcomer_share
        for pack in (packs["sailing"], mixed, packs["cooking"])
    ]

    assert shares == sorted(shares)


def test_the_order_of_the_older_domains_does_not_matter(packs: dict[str, DomainPack]) -> None:
    one = {"cooking": packs["cooking"], "sailing": packs["sailing"]}
    other = dict(reversed(one.items()))

    assert measure_drift(packs["general"], one, packs["cooking"], width=WIDTH) == measure_drift(
        packs["general"], other, packs["cooking"], width=WIDTH
    )


def test_drift_needs_neither_text_nor_experts(packs: dict[str, DomainPack]) -> None:
    bare = {
        name: replace(
            pack,
            bank=ExpertBank({1: pack.bank.layers[1]}),
            prototypes=torch.zeros(1, WIDTH),
        )
        for name, pack in packs.items()
    }

    assert measure_drift(bare["general"], {"cooking": bare["cooking"]}, bare["sailing"], width=WIDTH) == measure_drift(
        packs["general"], {"cooking": packs["cooking"]}, packs["sailing"], width=WIDTH
    )


def test_the_manifest_holds_the_drift(whole: Registry, packs: dict[str, DomainPack]) -> None:
    others, roles = {"cooking": packs["cooking"]}, whole.base.roles
    drift = measure_drift(packs["general"], others, packs["sailing"], width=WIDTH, roles=roles)

    assert whole.show("sailing").proof["drift"] == {f.name: getattr(drift, f.name) for f in fields(Drift)}
    assert whole.show("cooking").proof["drift"]["domains"] == 0


def test_without_hidden_evidence_only_tokens_count(packs: dict[str, DomainPack]) -> None:
    temperatures = Temperatures(token=0.3, hidden=0.0)
    plain = {name: replace(pack, temperatures=temperatures) for name, pack in packs.items()}
    moved = replace(
        plain["sailing"],
        statistics=replace(plain["sailing"].statistics, feature_sum=plain["sailing"].statistics.feature_sum + 1),
    )

    found = [
        measure_drift(plain["general"], {"cooking": plain["cooking"]}, new, width=WIDTH)
        for new in (plain["sailing"], moved)
    ]

    assert found[0] == found[1]
