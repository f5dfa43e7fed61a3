"""The frozen proof, sabotaged in every way we can think of: nothing is stored, and the command works afterwards."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorary.domains.errors import IntegrityError, NotFoundError
from lorary.registry import Registry
from lorary.registry.learn import train as learning
from lorary.registry.learn.proof import (
    FrozenDigests,
    check_only_new_is_trainable,
    digest_of_tensors,
    frozen_digests,
    prove,
    trainable_parameters,
)
from lorary.registry.maintenance.verify import verify_store
from lorary.registry.store.gc import collect_garbage
from lorary.registry.store.root import StoreState, read_state
from lorary.registry.store.seals import write_sealed
from lorary.registry.store.strict_json import canonical_json
from lorary.registry.store.versions import DomainFolder

LEGAL = StoreState("store", {"domains/legal/1.json": "sha256:c"})
BASE_WEIGHT = "model.layers.2.mlp.down_proj"
FUSED = "model.layers.2.mlp.down_proj"


# --- sabotage: each does its mischief around the real training ---


def base_parameter_in_the_optimizer(composed: Any, train: Callable[[], Any]) -> Any:
    composed.get_submodule(f"{FUSED}.base").weight.requires_grad_(True)
    return train()


def base_parameter_in_the_optimizer_hidden_afterwards(composed: Any, train: Callable[[], Any]) -> Any:
    weight = composed.get_submodule(f"{FUSED}.base").weight.requires_grad_(True)
    figures = train()
    weight.requires_grad_(False)
    return figures


def every_parameter_in_the_optimizer(composed: Any, train: Callable[[], Any]) -> Any:
    composed.requires_grad_(True)
    return train()


def preservation_expert_with_a_gradient(composed: Any, train: Callable[[], Any]) -> Any:
    composed.get_submodule(FUSED).group.Bt0.requires_grad_(True)
    figures = train()
    composed.get_submodule(FUSED).group.Bt0.data.mul_(0.99)  # an exponential average, say
    return figures


def preservation_expert_that_moves(composed: Any, train: Callable[[], Any]) -> Any:
    figures = train()
    composed.get_submodule(FUSED).group.A[0, 0] += 1e-7
    return figures


def preservation_gate_that_moves(composed: Any, train: Callable[[], Any]) -> Any:
    figures = train()
    composed.get_submodule("model.layers.3.expert_gates").rows[0, 0] += 1e-6
    return figures


def weight_decay_on_the_embedding(composed: Any, train: Callable[[], Any]) -> Any:
    figures = train()
    with torch.no_grad():
        composed.get_input_embeddings().weight.mul_(1 - 1e-6)
    return figures


def one_bit_of_a_norm(composed: Any, train: Callable[[], Any]) -> Any:
    weight = composed.model.norm.weight
    figures = train()
    with torch.no_grad():
        weight.view(torch.int32)[0] ^= 1
    return figures


def base_module_that_is_exchanged(composed: Any, train: Callable[[], Any]) -> Any:
    figures = train()
    composed.get_submodule(FUSED).base = nn.Linear(48, 32, bias=False).requires_grad_(False)
    return figures


SABOTAGES = [
    base_parameter_in_the_optimizer,
    base_parameter_in_the_optimizer_hidden_afterwards,
    every_parameter_in_the_optimizer,
    preservation_expert_with_a_gradient,
    preservation_expert_that_moves,
    preservation_gate_that_moves,
    weight_decay_on_the_embedding,
    one_bit_of_a_norm,
    base_module_that_is_exchanged,
]


@pytest.fixture
def add_sailing(texts: Any, short_run: Any) -> Callable[..., Any]:
    """Adds the domain in two steps of training."""
    return lambda registry, **options: registry.add_domain(
        "sailing", data=[texts["sailing"]], **short_run(steps=2, checkpoint_every=1), **options
    )


@pytest.fixture(scope="session")
def honest_digest(tmp_path_factory: pytest.TempPathFactory, kp_store: Path, texts: Any, short_run: Any) -> str:
    """The pack digest that `add_sailing` gives where nobody interferes."""
    registry = Registry.open(shutil.copytree(kp_store, tmp_path_factory.mktemp("honest") / "store"))
    run = short_run(steps=2, checkpoint_every=1)
    return registry.add_domain("sailing", data=[texts["sailing"]], **run).manifest.digest


@pytest.fixture
def sabotaged(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`with sabotaged(act):` lets `act(composed, train)` run instead of `train_bank`; `train()` is the real one."""

    @contextmanager
    def wrapped(act: Callable[..., Any]) -> Iterator[None]:
        train_bank = learning.train_bank

        def instead(composed: Any, *args: Any, **options: Any) -> Any:
            return act(composed, lambda: train_bank(composed, *args, **options))

        with monkeypatch.context() as seam:
            seam.setattr(learning, "train_bank", instead)
            yield

    return wrapped


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda sabotage: sabotage.__name__)
def test_sabotage_stores_nothing(
    sabotage: Any, kp_store: Path, fresh_copy: Any, add_sailing: Any, state_of: Any, sabotaged: Any
) -> None:
    registry = fresh_copy(kp_store)
    before = state_of(registry.store)

    with sabotaged(sabotage), pytest.raises(IntegrityError) as caught:
        add_sailing(registry)

    assert caught.value.exit_code == 5
    assert state_of(registry.store) == before
    for manifest in registry.list():
        registry.store.verify(manifest)
    assert not list(registry.store.runs.glob("*/checkpoint-*"))


@pytest.mark.parametrize(
    "sabotage",
    [base_parameter_in_the_optimizer, preservation_expert_that_moves],
    ids=lambda sabotage: sabotage.__name__,
)
def test_the_same_command_works_after_a_sabotage(
    sabotage: Any, kp_store: Path, fresh_copy: Any, add_sailing: Any, honest_digest: str, sabotaged: Any
) -> None:
    registry = fresh_copy(kp_store)
    with sabotaged(sabotage), pytest.raises(IntegrityError):
        add_sailing(registry)

    # the same object in the same process: neither a spoilt base nor a spoilt checkpoint may be used
    assert add_sailing(registry).manifest.digest == honest_digest


def test_a_base_weight_that_changes_while_training_is_noticed(
    kp_store: Path, fresh_copy: Any, add_sailing: Any, state_of: Any, honest_digest: str
) -> None:
    registry = fresh_copy(kp_store)
    before = state_of(registry.store)

    def spoil(progress: Any) -> None:
        if progress.stage == "training sailing" and progress.done == 1:
            registry.base.model.get_submodule(BASE_WEIGHT).weight.data[0, 0] += 1

    with pytest.raises(IntegrityError, match="base model") as caught:
        add_sailing(registry, on_progress=spoil)

    assert "before sha256:" in str(caught.value.cause)
    assert state_of(registry.store) == before
    assert add_sailing(registry).manifest.digest == honest_digest


def test_a_blob_of_an_older_domain_that_changes_while_training_is_noticed(
    cooking_store: Path, fresh_copy: Any, add_sailing: Any, state_of: Any
) -> None:
    registry = fresh_copy(cooking_store)
    before = state_of(registry.store)
    file = registry.show("cooking").file("adapter_model.safetensors")
    path = registry.store.blobs.path(file.sha256)
    honest = path.read_bytes()

    def spoil(progress: Any) -> None:
        if progress.stage == "training sailing" and progress.done == 1:
            path.chmod(0o644)
            path.write_bytes(honest[:-1] + bytes([honest[-1] ^ 1]))

    with pytest.raises(IntegrityError, match="cooking@1") as caught:
        add_sailing(registry, on_progress=spoil)

    assert caught.value.exit_code == 5
    assert state_of(registry.store) == before
    path.write_bytes(honest)
    assert add_sailing(registry).manifest.version == 1


def test_a_version_that_is_not_the_latest_is_proved_as_well(
    cooking_store: Path, fresh_copy: Any, add_sailing: Any
) -> None:
    registry = fresh_copy(cooking_store)
    store, first = registry.store, registry.show("cooking")
    other = {file.path: (store.read(first, file.path), file.kind) for file in first.files}
    other["README.md"] = (b"# Cooking, again", "card")
    old_only = store.blobs.put(b"# Cooking")
    path = store.path / "domains" / "cooking" / "1.json"
    card = replace(first.files[0], path="README.md", sha256=old_only, size=9, kind="card")
    write_sealed(path, replace(first, files=(*first.files, card)).to_json())
    store.commit(replace(first, description="a second version"), other)
    store.blobs.path(old_only).chmod(0o644)
    store.blobs.path(old_only).write_bytes(b"# cooking")

    with pytest.raises(IntegrityError, match="cooking@1"):
        add_sailing(registry)


# --- removed versions: their files may be gone ---


def test_a_domain_can_be_added_after_gc_has_deleted_a_removed_version(
    cooking_store: Path, fresh_copy: Any, add_sailing: Any
) -> None:
    registry = fresh_copy(cooking_store)
    registry.remove("cooking")
    assert collect_garbage(registry.store, grace_s=-1).blobs

    added = add_sailing(registry).manifest

    assert added.proof["unchanged"] is True
    assert {one.state for one in verify_store(registry.store)} == {"ok"}
    with pytest.raises(NotFoundError, match="cooking@1 cannot be restored"):
        registry.restore("cooking@1")


def test_a_version_that_is_removed_and_collected_while_another_trains_does_not_break_the_proof(
    cooking_store: Path, fresh_copy: Any, add_sailing: Any
) -> None:
    registry = fresh_copy(cooking_store)

    def remove(progress: Any) -> None:
        if progress.stage == "training sailing" and progress.done == 1:
            registry.remove("cooking")
            collect_garbage(registry.store, grace_s=-1)

    assert add_sailing(registry, on_progress=remove).manifest.proof["unchanged"] is True


def test_the_same_domain_can_be_added_again_after_it_was_removed_and_collected(
    cooking_store: Path, fresh_copy: Any, texts: Any, short_run: Any
) -> None:
    registry = fresh_copy(cooking_store)
    first = registry.remove("cooking")
    collect_garbage(registry.store, grace_s=-1)

    again = registry.add_domain("cooking", data=[texts["cooking"]], **short_run()).manifest

    assert (again.version, again.digest) == (2, first.digest)
    registry.store.verify(again)


# --- the parts ---


def test_the_digest_covers_names_types_shapes_and_bytes() -> None:
    tensors = {"a": torch.arange(6.0), "b": torch.zeros(2)}
    plain = digest_of_tensors(tensors.items())

    assert digest_of_tensors(reversed(tensors.items())) == plain
    assert len({plain, *(digest_of_tensors(altered.items()) for altered in _altered(tensors))}) == 8


def _altered(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    a, b = tensors["a"], tensors["b"]
    return [
        {"a": a, "c": b},
        {"a": b, "b": a},
        {"a": a.view(2, 3), "b": b},
        {"a": a.view(torch.int32), "b": b},
        {"a": a, "b": torch.tensor([0.0, -0.0])},
        {"a": a},
        {"a": a, "b": b, "c": torch.zeros(0)},
    ]


def test_the_digest_of_a_view_is_that_of_its_values() -> None:
    matrix = torch.arange(12.0).view(3, 4)

    assert digest_of_tensors([("a", matrix.T)]) == digest_of_tensors([("a", matrix.T.contiguous())])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_the_digest_takes_any_type(dtype: torch.dtype) -> None:
    assert digest_of_tensors([("a", torch.ones(3).to(dtype))]).startswith("sha256:")


def test_only_the_new_bank_of_a_composed_model_is_trainable(whole: Registry) -> None:
    composed = whole.compose("cooking")

    check_only_new_is_trainable(composed)

    assert trainable_parameters(composed) == []
    composed.lm_head.weight = nn.Parameter(composed.lm_head.weight.detach().clone())
    with pytest.raises(IntegrityError, match="set to be trained") as caught:
        check_only_new_is_trainable(composed)
    assert "lm_head.weight" in str(caught.value.cause)


def test_the_proof_covers_the_base_everything_attached_and_every_pack(whole: Registry) -> None:
    composed = whole.compose("cooking+sailing")
    digests = frozen_digests(whole.base.model, composed, whole.store)

    kp_buffers = sum(1 for name, _ in composed.named_buffers() if name.endswith((".A", ".Bt0", ".rows")))
    assert digests.tensors >= len(whole.base.model.state_dict()) + kp_buffers
    assert digests.store.versions.keys() == {f"{m.name}@1" for m in whole.list()}
    assert prove(digests, digests)["unchanged"] is True


@pytest.mark.parametrize("part", ["base", "attached"])
def test_a_difference_is_named_with_both_digests(part: str) -> None:
    before = FrozenDigests("sha256:a", "sha256:b", LEGAL, 3)

    with pytest.raises(IntegrityError, match=part) as caught:
        prove(before, replace(before, **{part: "sha256:d"}))

    assert getattr(before, part) in str(caught.value.cause)
    assert "sha256:d" in str(caught.value.cause)


@pytest.mark.parametrize("files", [{}, {"domains/legal/1.json": "sha256:d"}], ids=["vanished", "changed"])
def test_a_pack_that_vanished_or_changed_is_named(files: dict[str, str]) -> None:
    before = FrozenDigests("sha256:a", "sha256:b", LEGAL, 3)

    with pytest.raises(IntegrityError, match="legal@1"):
        prove(before, replace(before, store=replace(LEGAL, files=files)))


def test_what_others_commit_meanwhile_changes_the_root_and_breaks_no_proof() -> None:
    before = FrozenDigests("sha256:a", "sha256:b", LEGAL, 3)
    later = replace(LEGAL, files={**LEGAL.files, "domains/tax/1.json": "sha256:d"})

    assert prove(before, before)["frozen"]["store"] == {"before": LEGAL.root, "after": LEGAL.root}
    assert prove(before, replace(before, store=later))["frozen"]["store"] == {"before": LEGAL.root, "after": later.root}


# --- a pack tells of nobody else ---


def test_a_version_names_no_other_domain(cooking_store: Path, fresh_copy: Any, texts: Any, short_run: Any) -> None:
    registry = fresh_copy(cooking_store)
    store, cooking = registry.store, registry.show("cooking")
    for number in range(2):
        store.adopt(replace(cooking, name=f"secret-{number}"), alias="latest")

    added = registry.add_domain("baking", data=[texts["sailing"], texts["cooking"]], **short_run(steps=1))

    document = added.manifest.to_json().decode()
    assert not [name for name in ("cooking@", "secret") if name in document]
    assert added.manifest.named_others == ()


def test_the_proof_has_the_same_size_beside_any_number_of_versions(cooking_store: Path, fresh_copy: Any) -> None:
    registry = fresh_copy(cooking_store)
    store, cooking = registry.store, registry.show("cooking")
    composed = registry.compose("cooking")
    sizes = set()
    for others in (0, 40):
        for number in range(others):
            name = DomainFolder(store.path, f"other-{number}")
            name.link(1, replace(cooking, name=f"other-{number}").to_json())
        digests = frozen_digests(registry.base.model, composed, store)
        assert len(digests.store.versions) == 2 + others
        sizes.add(len(canonical_json(prove(digests, digests))))

    assert len(sizes) == 1


def test_the_root_covers_every_byte_of_manifests_aliases_and_tombstones(cooking_store: Path, fresh_copy: Any) -> None:
    store = fresh_copy(cooking_store).store
    store.set_alias("cooking", "production", 1)
    DomainFolder(store.path, "cooking").remove(1, time="2026-01-02")
    whole = read_state(store)

    roots = {whole.root}
    for path in whole.files:
        data = (store.path / path).read_bytes()
        (store.path / path).write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        roots.add(read_state(store).root)
        (store.path / path).write_bytes(data)

    assert len(whole.files) == 6  # two manifests, latest of both, production, a tombstone
    assert len(roots) == 7
    assert read_state(store) == whole
    assert replace(whole, id="another").root != whole.root
