"""Learning a bank: what changes and what does not, the warm start, and the same bytes every time."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.adapters.layer.attach import trained_bank
from lorary.domains.errors import IntegrityError
from lorary.domains.progress import Progress
from lorary.domains.statistics.statistics import MIN_COUNT
from lorary.registry import Registry
from lorary.registry.compose.build import base_router
from lorary.registry.learn import train as learning
from lorary.registry.learn.proof import digest_of_tensors
from lorary.registry.learn.rare_tokens import RARE_FILE, with_rare_tokens
from lorary.registry.learn.run import TrainingRun
from lorary.registry.pack.pack import DomainPack, read_pack

LEARN = """
import sys
from lorary.adapters.config import BankConfig, TrainingConfig
from lorary.registry import Registry

store, base, general, cooking = sys.argv[1:]
run = {
    "bank": BankConfig(rank=2, expert_free=0.25),
    "training": TrainingConfig(steps=6, block=64, batch=2, learning_rate=1e-2, checkpoint_every=2),
}
registry = Registry.init(store, base=base, data=[general], **run)
registry.add_domain("cooking", data=[cooking], **run)
print(*(manifest.digest for manifest in registry.list()))
"""


@pytest.fixture
def learned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects training runs on their way to the store."""
    train, runs = TrainingRun.train, []

    def watched(run: TrainingRun) -> None:
        train(run)
        runs.append(run)

    monkeypatch.setattr(TrainingRun, "train", watched)
    return runs


@pytest.fixture
def around_training(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collects digests of all tensors before training, those after it, and the trained bank."""
    train_bank, found = learning.train_bank, []

    def watched(composed: Any, *args: Any, **options: Any) -> Any:
        found.append(_digests(composed))
        figures = train_bank(composed, *args, **options)
        found.extend([_digests(composed), trained_bank(composed)])
        return figures

    monkeypatch.setattr(learning, "train_bank", watched)
    return found


def test_only_the_new_bank_differs_after_training(
    cooking_store: Path, fresh_copy: Any, texts: Any, short_run: Any, around_training: list[Any]
) -> None:
    registry = fresh_copy(cooking_store)
    base = _digests(registry.base.model)

    registry.add_domain("sailing", data=[texts["sailing"]], **short_run())

    before, after, bank = around_training
    new = {name for name in before if name.rpartition(".")[2] in ("new_A", "new_B", "new_expert_gate", "new_rank_gate")}
    # an expert that is alone in its layer has a share of one whatever its gate is, whose gradient is exactly zero
    alone = {index for index, layer in bank.layers.items() if len(layer.experts) == 1}
    unmoved = {f"model.layers.{index}.expert_gates.new_expert_gate" for index in alone}
    assert unmoved < new
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == new - unmoved
    assert _digests(registry.base.model) == base


def test_the_stored_tensors_are_the_very_ones_that_were_trained(
    cooking_store: Path, fresh_copy: Any, texts: Any, short_run: Any, learned: list[Any], around_training: list[Any]
) -> None:
    registry = fresh_copy(cooking_store)

    manifest = registry.add_domain("sailing", data=[texts["sailing"]], **short_run()).manifest

    stored, packed, trained = read_pack(registry.store, manifest), learned[0].pack, around_training[2]
    assert stored.bank.experts == packed.bank.experts
    assert _plain(stored) == _plain(packed)
    for name, tensor in trained.tensors():
        assert torch.equal(tensor, dict(stored.bank.tensors())[name]), name


def test_a_close_neighbour_lends_its_experts(cooking_store: Path, fresh_copy: Any, texts: Any, short_run: Any) -> None:
    registry = fresh_copy(cooking_store)

    added = registry.add_domain("baking", data=[texts["cooking"]], **short_run(steps=1))

    nearest = added.neighbours[0]
    assert (nearest.name, added.copied_from) == ("cooking", "cooking")
    assert added.manifest.train["warm_start"] == registry.show("cooking").digest
    assert nearest.similarity > 0.99


def test_the_first_domain_has_no_neighbour(kp_store: Path, fresh_copy: Any, texts: Any, short_run: Any) -> None:
    added = fresh_copy(kp_store).add_domain("cooking", data=[texts["cooking"]], **short_run(steps=1))

    assert added.neighbours == []
    assert added.copied_from is None


def test_a_neighbour_of_another_shape_lends_nothing(
    cooking_store: Path, fresh_copy: Any, texts: Any, short_run: Any
) -> None:
    from lorary.adapters.config import BankConfig

    run = short_run(steps=1) | {"bank": BankConfig(rank=3, expert_free=0.25)}
    added = fresh_copy(cooking_store).add_domain("baking", data=[texts["cooking"]], **run)

    assert added.neighbours[0].name == "cooking"
    assert added.copied_from is None


def test_rare_tokens_are_not_stored_in_the_pack_but_kept_by_the_run(whole: Registry) -> None:
    manifest = whole.show("cooking")
    statistics = read_pack(whole.store, manifest).statistics

    kept = with_rare_tokens(whole.store, manifest, statistics)

    for name in ("token_counts", "pair_counts"):
        stored, all_of_them = getattr(statistics, name), getattr(kept, name)
        assert stored.sum() > 200
        assert stored[stored > 0].min() >= MIN_COUNT
        assert torch.equal(all_of_them[stored > 0], stored[stored > 0])
        assert set(all_of_them[stored == 0].tolist()) == {0, 1}


def test_a_damaged_file_of_rare_tokens_is_named(whole: Registry, fresh_copy: Any) -> None:
    registry = fresh_copy(whole.store.path)
    manifest = registry.show("cooking")
    path = registry.store.runs / manifest.train["run"] / RARE_FILE
    path.write_bytes(path.read_bytes()[:-3])

    with pytest.raises(IntegrityError, match=RARE_FILE):
        with_rare_tokens(registry.store, manifest, read_pack(registry.store, manifest).statistics)


def test_the_order_of_adding_does_not_matter_to_the_router(
    both_store: Path, kp_store: Path, fresh_copy: Any, texts: Any, short_run: Any
) -> None:
    other = fresh_copy(kp_store)
    for name in ("sailing", "cooking"):
        other.add_domain(name, data=[texts[name]], **short_run(steps=1))

    found, expected = _router(other), _router(Registry.open(both_store))

    for part in ("starts", "columns", "values", "rows", "bias", "ridge"):
        torch.testing.assert_close(found[part], expected[part], rtol=1e-4, atol=1e-6)


def test_progress_is_told_to_the_end(cooking_store: Path, fresh_copy: Any, texts: Any, short_run: Any) -> None:
    told: list[Progress] = []

    fresh_copy(cooking_store).add_domain("sailing", data=[texts["sailing"]], **short_run(), on_progress=told.append)

    last = {progress.stage: (progress.done, progress.total) for progress in told}
    assert last["training sailing"] == (6, 6)
    assert all(done == total for done, total in last.values())
    assert all(p.figures["loss"] > 0 for p in told if p.stage == "training sailing")


def test_the_same_data_and_seed_give_the_same_pack_in_every_process(
    whole: Registry, base_folder: Path, texts: Any, tmp_path: Path
) -> None:
    # this process has another hash seed: it takes a random one unless it is given one
    environment = os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"}
    command = [sys.executable, "-c", LEARN, tmp_path / "store", base_folder, texts["general"], texts["cooking"]]

    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=200)

    assert done.stdout.split() == [whole.show(name).digest for name in ("general", "cooking")], done.stderr


def test_another_seed_gives_another_pack(
    kp_store: Path, fresh_copy: Any, texts: Any, short_run: Any, whole: Registry
) -> None:
    added = fresh_copy(kp_store).add_domain("cooking", data=[texts["cooking"]], **short_run(seed=1))

    assert added.manifest.digest != whole.show("cooking").digest
    assert added.manifest.train["data"] == whole.show("cooking").train["data"]


def test_the_random_state_of_the_caller_is_left_alone(
    kp_store: Path, fresh_copy: Any, texts: Any, short_run: Any
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    fresh_copy(kp_store).add_domain("cooking", data=[texts["cooking"]], **short_run(steps=1))

    assert torch.equal(torch.rand(3), expected)


def _digests(module: Any) -> dict[str, str]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: digest_of_tensors([("", tensor)]) for name, tensor in named}


def _plain(pack: DomainPack) -> dict[str, Any]:
    """A pack as values that can be compared."""
    tensors = dict(pack.bank.tensors()) | pack.statistics.tensors() | {"prototypes": pack.prototypes}
    digests = {name: digest_of_tensors([("", tensor)]) for name, tensor in tensors.items()}
    return digests | {"tempers": pack.temperatures, "feature_layer": pack.feature_layer}


def _router(registry: Registry) -> dict[str, torch.Tensor]:
    packs = [read_pack(registry.store, registry.show(name)) for name in ("general", "cooking", "sailing")]
    return base_router(packs, torch.tensor([0.6, 0.2, 0.2]), registry.base).tensors()
