"""Retraining: what each mode keeps, what it adds, and what the gate lets through."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.adapters.router.evidence import token_evidence
from lorary.adapters.router.router import discriminant_rows
from lorary.domains.data.corpus import read_examples, split
from lorary.domains.errors import InputError, IntegrityError
from lorary.domains.statistics.statistics import DomainStatistics
from lorary.registry import Registry
from lorary.registry.learn import train as learning
from lorary.registry.learn.rare_tokens import with_rare_tokens
from lorary.registry.learn.retrain_plan import plan_retraining
from lorary.registry.measure.held_out import HELD_OUT, stored_held_out
from lorary.registry.pack.check_pack import check_pack
from lorary.registry.pack.pack import read_pack
from lorary.registry.store.gc import collect_garbage
from lorary.registry.store.store import Store

MODES = ("extend", "continue", "fresh")


@pytest.fixture(scope="session")
def more(tmp_path_factory: pytest.TempPathFactory, texts: Any) -> Path:
    """New text about cooking: other words than the first, and a third of the first's rows once more."""
    draw = random.Random("more")
    words = "flour oven sugar whisk basil thyme saffron nutmeg vanilla braise poach fillet stock ladle"
    rows = [f'{{"text": "{" ".join(draw.choices(words.split(), k=14))}."}}\n' for _ in range(24)]
    path = tmp_path_factory.mktemp("more") / "more.jsonl"
    path.write_text("".join(rows) + "".join(texts["cooking"].read_text().splitlines(keepends=True)[:8]))
    return path


@pytest.fixture(scope="session")
def run(short_run: Any) -> dict[str, Any]:
    """Settings of a short training."""
    return {"training": short_run()["training"]}


@pytest.fixture(scope="session")
def retrained(
    tmp_path_factory: pytest.TempPathFactory, cooking_store: Path, more: Path, run: Any
) -> Callable[[str], Any]:
    """`retrained(mode)`: registry and outcome; done once a mode; tests only read."""
    known: dict[str, Any] = {}

    def get(mode: Any) -> Any:
        if mode not in known:
            folder = tmp_path_factory.mktemp(mode) / "store"
            registry = Registry.open(shutil.copytree(cooking_store, folder))
            outcome = registry.retrain("cooking", data=[more], mode=mode, tolerance=9.0, **run)
            known[mode] = (registry, outcome)
        return known[mode]

    return get


@pytest.fixture
def registry(cooking_store: Path, fresh_copy: Any) -> Registry:
    """KP and `cooking`, free to be changed."""
    return fresh_copy(cooking_store)


# --- what every mode does ---


@pytest.mark.parametrize("mode", MODES)
def test_a_new_version_is_stored_with_its_lineage_and_both_scores(mode: Any, retrained: Any) -> None:
    registry, outcome = retrained(mode)
    manifest, parent = outcome.manifest, registry.show("cooking@1")

    assert (manifest.version, manifest.parent, manifest.lineage["mode"]) == (2, 1, mode)
    assert manifest.lineage["parent"]["digest"] == parent.digest
    assert registry.show("cooking") == registry.show("cooking@2") == manifest
    gate = manifest.evaluation["gate"]
    assert gate["holds"] is True
    assert gate["parent"] == pytest.approx(parent.evaluation["routed"], abs=2e-5)
    assert gate["new"] > 0
    assert manifest.proof["unchanged"] is True
    assert set(manifest.proof["frozen"]) == {"base", "attached", "store", "tensors"}
    assert manifest.proof["drift"]["domains"] == 0  # no other domain to compare
    check_pack(registry.store, manifest)


def test_a_version_can_be_retrained_after_gc_has_deleted_its_removed_parent(
    registry: Registry, more: Path, texts: Any, run: Any
) -> None:
    registry.retrain("cooking", data=[more], tolerance=9.0, **run)
    registry.remove("cooking@1")
    assert collect_garbage(registry.store, grace_s=-1).blobs

    third = registry.retrain("cooking", data=[texts["sailing"]], tolerance=9.0, **run).manifest

    assert (third.version, third.parent) == (3, 2)
    check_pack(registry.store, third)


@pytest.mark.parametrize("mode", MODES)
def test_what_was_held_out_stays_held_out(mode: Any, retrained: Any, texts: Any, more: Path) -> None:
    registry, outcome = retrained(mode)
    first = split(read_examples([texts["cooking"]]), HELD_OUT)[1]
    own = split(read_examples([more]), HELD_OUT)[1]

    found = stored_held_out(registry.store, outcome.manifest)

    expected = own if mode == "fresh" else first + own
    assert {e.digest() for e in found} == {e.digest() for e in expected}
    assert len({e.digest() for e in found}) == len(found)


def test_nothing_that_the_parent_held_out_is_trained_on(registry: Registry, texts: Any, more: Path) -> None:
    held_out = stored_held_out(registry.store, registry.show("cooking"))

    plan = plan_retraining(registry.store, registry.show("cooking"), [texts["cooking"], more])

    assert not {e.digest() for e in plan.data.train} & {e.digest() for e in held_out + plan.data.held_out}
    assert plan.older == held_out


@pytest.mark.parametrize("mode", MODES)
def test_statistics_are_added_except_by_fresh(mode: Any, retrained: Any) -> None:
    registry, _ = retrained(mode)
    own = _all_tokens(retrained("fresh")[0], "cooking@2")
    first = _all_tokens(registry, "cooking@1")

    found = read_pack(*_version(registry, "cooking@2")).statistics

    expected = (own if mode == "fresh" else first + own).without_rare_tokens()
    for name, tensor in found.tensors().items():
        assert torch.equal(tensor, expected.tensors()[name]), name


@pytest.mark.parametrize("mode", MODES)
def test_the_same_data_seed_and_parent_give_the_same_digest(
    mode: Any, retrained: Any, registry: Registry, more: Path, run: Any, tmp_path: Path
) -> None:
    moved = shutil.copy(more, tmp_path)

    outcome = registry.retrain("cooking@1", data=[moved], mode=mode, tolerance=9.0, **run)

    assert outcome.manifest.digest == retrained(mode)[1].manifest.digest


@pytest.mark.parametrize("mode", MODES)
def test_the_new_version_composes_with_others_and_loads_as_the_model_that_was_scored(
    mode: Any, retrained: Any, logits_of: Any
) -> None:
    registry, outcome = retrained(mode)

    found = logits_of(registry.compose("cooking@2"))

    assert found.isfinite().all()
    assert (found - logits_of(registry.compose("cooking@1"))).abs().max() > 1e-6
    scores = registry.evaluate("cooking@2", questions=False)["cooking"]
    assert scores.routed == pytest.approx(outcome.manifest.evaluation["routed"], abs=1e-5)


# --- extend ---


def test_extend_keeps_the_files_of_every_expert_of_the_parent(retrained: Any) -> None:
    registry, outcome = retrained("extend")
    parent = registry.show("cooking@1")

    inherited = {file.path: file.sha256 for file in parent.files if file.kind == "expert"}
    new = {file.path: file.sha256 for file in outcome.manifest.files if file.kind == "expert"}

    assert inherited.items() < new.items()
    assert outcome.manifest.proof["inherited"]["from"] == "cooking@1"
    assert outcome.manifest.proof["inherited"]["experts"] == len(parent.experts)


def test_extend_adds_experts_in_every_layer_of_a_generation_of_their_own(retrained: Any) -> None:
    registry, outcome = retrained("extend")
    parent = registry.show("cooking@1")

    generations = [expert.generation for expert in outcome.manifest.experts]
    assert generations == [0] * len(parent.experts) + [1] * (len(generations) - len(parent.experts))
    assert outcome.manifest.experts[: len(parent.experts)] == parent.experts
    before, after = parent.allocation["counts"], outcome.manifest.allocation["counts"]
    assert all(new > old for old, new in zip(before, after, strict=True) if old)


def test_extend_leaves_the_parents_gates_in_the_new_pack_as_they_were(retrained: Any) -> None:
    registry, _ = retrained("extend")
    old, new = read_pack(*_version(registry, "cooking@1")).bank, read_pack(*_version(registry, "cooking@2")).bank

    for index, layer in old.layers.items():
        assert torch.equal(new.layers[index].expert_gate[: len(layer.experts)], layer.expert_gate)
        assert torch.equal(new.layers[index].rank_rows()[: layer.rank], layer.rank_rows())
        assert torch.equal(new.layers[index].static_gate()[: layer.rank], layer.static_gate())


def test_extend_starts_as_the_parent_whose_statistics_are_added(
    registry: Registry, more: Path, run: Any, monkeypatch: pytest.MonkeyPatch, logits_of: Any
) -> None:
    seen = []

    def watched(composed: Any, *args: Any, **options: Any) -> Any:
        seen.extend([logits_of(composed), composed.routing.router])
        raise KeyboardInterrupt

    monkeypatch.setattr(learning, "train_bank", watched)
    with pytest.raises(KeyboardInterrupt):
        registry.retrain("cooking", data=[more], **run)

    parent: Any = registry.compose("cooking@1")
    parent.routing.router = seen[1]
    torch.testing.assert_close(seen[0], logits_of(parent), rtol=1e-5, atol=1e-5)


def test_extending_twice_gives_three_generations(registry: Registry, more: Path, texts: Any, run: Any) -> None:
    settings = {"training": replace(run["training"], steps=1), "tolerance": 9.0, "bank": {"rank": 1, "experts": 1.0}}
    registry.retrain("cooking", data=[more], **settings)

    outcome = registry.retrain("cooking", data=[texts["sailing"]], **settings)

    assert {expert.generation for expert in outcome.manifest.experts} == {0, 1, 2}
    assert [expert.rank for expert in outcome.manifest.experts] == [2, 2, 2, 1, 1]
    assert outcome.manifest.proof["inherited"]["from"] == "cooking@2"
    assert registry.compose("cooking") is not None


@pytest.mark.parametrize("sabotage", ["expert", "gate"])
def test_an_expert_of_the_parent_that_moves_stores_nothing(
    sabotage: str, registry: Registry, more: Path, run: Any, state_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, train_bank = state_of(registry.store), learning.train_bank
    kp = read_pack(registry.store, registry.show("general")).bank

    def instead(composed: Any, *args: Any, **options: Any) -> Any:
        figures = train_bank(composed, *args, **options)
        layer = composed.model.layers[2]
        if sabotage == "expert":  # the first rank behind KP's
            tensors = [t for name, t in layer.named_buffers() if name.rpartition(".")[2].startswith(("A", "B"))]
            tensors[0].view(-1)[-1] += 1e-6
        else:
            layer.expert_gates.rows[len(kp.layers[2].experts), 0] += 1e-6
        return figures

    with monkeypatch.context() as seam:
        seam.setattr(learning, "train_bank", instead)
        with pytest.raises(IntegrityError, match="attached") as caught:
            registry.retrain("cooking", data=[more], **run)

    assert caught.value.exit_code == 5
    assert state_of(registry.store) == before
    assert registry.retrain("cooking", data=[more], tolerance=9.0, **run).manifest.version == 2


# --- continue and fresh ---


def test_continue_trains_a_copy_of_the_same_shape(retrained: Any) -> None:
    registry, outcome = retrained("continue")
    parent = registry.show("cooking@1")
    old, new = read_pack(*_version(registry, "cooking@1")).bank, read_pack(*_version(registry, "cooking@2")).bank

    assert outcome.manifest.experts == parent.experts
    assert "inherited" not in outcome.manifest.proof
    changed = [name for name, tensor in new.tensors() if not torch.equal(tensor, dict(old.tensors())[name])]
    assert any(name.endswith(".B") for name in changed)
    assert _distance(new, old) < _distance(read_pack(*_version(retrained("fresh")[0], "cooking@2")).bank, old)


def test_fresh_is_as_if_the_domain_had_begun_with_the_new_text(retrained: Any) -> None:
    _, outcome = retrained("fresh")

    assert {expert.generation for expert in outcome.manifest.experts} == {0}
    assert outcome.manifest.train["data"]["files"] == ["more.jsonl"]


# --- the gate ---


def test_a_version_that_is_worse_is_stored_and_held_back(
    registry: Registry, texts: Any, run: Any, state_of: Any
) -> None:
    worse: dict[str, Any] = {
        "training": replace(run["training"], steps=30, learning_rate=0.1),
        "mode": "fresh",
        "tolerance": 0.0,
    }

    outcome = registry.retrain("cooking", data=[texts["sailing"]], **worse)

    assert outcome.acceptance.change > 0
    assert outcome.manifest.is_held_back
    assert state_of(registry.store)["cooking"] == ([1, 2], {"latest": 1})
    assert registry.show("cooking").version == 1
    registry.store.verify(outcome.manifest)

    again = registry.retrain("cooking", data=[texts["sailing"]], **worse)
    assert (again.is_repeated, again.manifest.version) == (True, 2)

    settings: dict[str, Any] = {**worse, "tolerance": 100.0}
    accepted = registry.retrain("cooking", data=[texts["sailing"]], **settings)
    assert (accepted.is_repeated, registry.show("cooking").version) == (True, 2)


@pytest.mark.slow
def test_harm_to_one_kind_holds_a_version_back_though_the_average_is_better(
    registry: Registry, texts: Any, run: Any, tmp_path: Path
) -> None:
    rows = [
        json.loads(line) | {"source": name}
        for name in ("cooking", "sailing")
        for line in texts[name].read_text().splitlines()
    ]
    judge = tmp_path / "judge.jsonl"
    judge.write_text("".join(json.dumps(row) + "\n" for row in rows[12:]), encoding="utf-8")  # half as much cooking
    more = tmp_path / "more.jsonl"
    draw = random.Random("other")
    mixed = [" ".join(draw.sample(row["text"].split(), 14)) for row in rows[24:] for _ in range(2)]
    more.write_text("".join(json.dumps({"text": text}) + "\n" for text in mixed), encoding="utf-8")
    learned = {"training": replace(run["training"], steps=30, learning_rate=0.05), "mode": "fresh"}

    outcome = registry.retrain("cooking", data=[more], gate_data=[judge], **learned)

    check = outcome.acceptance
    assert check.change < 0
    assert [kind.kind for kind in check.failing] == ["cooking"]
    assert outcome.manifest.is_held_back
    (found,) = check.portraits
    assert len(found.examples) == 3
    stored = outcome.manifest.evaluation["gate"]
    assert {kind["kind"] for kind in stored["kinds"]} == {"cooking", "sailing"}
    assert not any(word in json.dumps(stored) for example in found.examples for word in example.split())
    again = registry.retrain("cooking", data=[more], gate_data=[judge], **learned)
    assert (again.is_repeated, again.acceptance.kinds) == (True, check.kinds)
    assert len(again.acceptance.portraits) == 1


def test_other_text_may_be_the_judge(registry: Registry, texts: Any, more: Path, run: Any) -> None:
    outcome = registry.retrain("cooking", data=[more], gate_data=[texts["sailing"]], tolerance=9.0, **run)

    assert outcome.manifest.evaluation["gate"]["bytes"] == sum(
        len(e.text.encode()) for e in read_examples([texts["sailing"]])
    )


def test_without_held_out_text_one_is_told_how_to_give_some(
    registry: Registry, texts: Any, more: Path, run: Any, tmp_path: Path, state_of: Any
) -> None:
    before = state_of(registry.store)
    shutil.rmtree(registry.store.runs)

    with pytest.raises(InputError, match="not on this machine") as caught:
        registry.retrain("cooking", data=[more], **run)

    assert "--gate-data FILE" in str(caught.value.fix)
    assert state_of(registry.store) == before
    assert registry.retrain("cooking", data=[more], gate_data=[texts["cooking"]], tolerance=9.0, **run).acceptance.holds


@pytest.mark.parametrize(
    ("reference", "options", "says"),
    [
        ("general", {}, "KP bank is never retrained"),
        ("cooking", {"data": None}, "nothing new to train"),
        ("cooking", {"data": []}, "data has no rows"),
        ("cooking", {"mode": "anew"}, "no mode 'anew'"),
        ("cooking", {"mode": "continue", "bank": {"rank": 8}}, "shape"),
        ("cooking", {"tolerance": -1.0}, "tolerance"),
        ("cooking", {"tolerance": float("nan")}, "tolerance"),
        ("cooking+sailing", {}, "one version"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_base_is_loaded(
    reference: str, options: dict[str, Any], says: str, registry: Registry, more: Path
) -> None:
    with pytest.raises(InputError, match=says):
        registry.retrain(reference, **{"data": [more], **options})

    assert registry._base is None


def test_new_experts_are_shaped_like_the_parents_as_far_as_its_settings_are_known(
    registry: Registry, more: Path
) -> None:
    manifest = registry.show("cooking")
    told = {"experts": 3.0, "rank_gates": False, "of_a_later_version": 1}
    parent = replace(manifest, train=manifest.train | {"bank": told})

    bank = plan_retraining(registry.store, parent, [more]).bank

    assert (bank.experts, bank.rank_gates) == (3.0, False)
    assert (bank.rank, bank.schedule) == (manifest.experts[-1].rank, "linear")


# --- compositions of any versions ---


def test_versions_of_several_domains_route_in_any_mix(retrained: Any, both_store: Path, logits_of: Any) -> None:
    registry, _ = retrained("extend")
    mixed, other = registry.store, Store.open(both_store)
    sailing = other.manifest("sailing")
    mixed.commit(sailing, {file.path: (other.read(sailing, file.path), file.kind) for file in sailing.files})
    texts = ["cooking@1+sailing@1", "cooking@2+sailing@1", "sailing+cooking@2:3"]

    found = [logits_of(registry.compose(text)) for text in texts]

    assert all(logits.isfinite().all() for logits in found)
    assert (found[0] - found[1]).abs().max() > 1e-6
    plan = registry.plan("sailing@1+cooking@2")
    statistics = {slot.name: read_pack(mixed, slot.manifest).statistics for slot in plan.slots}
    orders = [["general", "cooking", "sailing"], ["sailing", "general", "cooking"]]
    slots = [[statistics[name] for name in order] for order in orders]
    first, second = map(discriminant_rows, slots)
    places = [orders[1].index(name) for name in orders[0]]
    for part in ("rows", "bias"):
        torch.testing.assert_close(getattr(second, part)[places], getattr(first, part), rtol=1e-6, atol=0)
    evidence = [token_evidence([one.token_counts for one in part]) for part in slots]
    torch.testing.assert_close(evidence[1][:, places], evidence[0], rtol=1e-6, atol=0)


def _all_tokens(registry: Registry, reference: str) -> DomainStatistics:
    store, manifest = _version(registry, reference)
    return with_rare_tokens(store, manifest, read_pack(store, manifest).statistics)


def _version(registry: Registry, reference: str) -> tuple[Store, Any]:
    return registry.store, registry.show(reference)


def _distance(one: Any, other: Any) -> float:
    theirs = dict(other.tensors())
    return sum(float((tensor - theirs[name]).square().sum()) for name, tensor in one.tensors()) ** 0.5
