"""Importing adapters into a real registry: exact, routed, stored like any domain; refused for another base model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorary.adapters.layer.routing import fixed_slots, recording_routes, routing_of
from lorary.domains.errors import ConflictError, IncompatibleError, IntegrityError, NotFoundError
from lorary.registry import Registry
from lorary.registry.interop.import_plan import plan_import
from lorary.registry.pack.check_pack import check_pack

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="session")
def adapter(save_adapter: Callable[..., Path]) -> Path:
    """An adapter of all decoder layers, saved by PEFT; tests must not change it."""
    folder = save_adapter(seed=5, lora_alpha=6, target_modules="all-linear", rank_pattern={"down_proj": 2})
    return folder.rename(folder.with_name("my-adapter"))


@pytest.fixture(scope="session")
def imported(cooking_store: Path, adapter: Path, texts: Any) -> Registry:
    """The registry of KP and `cooking`, with the adapter as `sailing`; tests only read it."""
    registry = Registry.open(shutil.copytree(cooking_store, cooking_store.with_name("imported")))
    registry.import_adapter("sailing", adapter, data=[texts["sailing"]])
    return registry


def test_a_static_composition_is_plain_peft(imported: Registry, adapter: Path, by_peft: Any, logits_of: Any) -> None:
    ours = logits_of(imported.compose("sailing", static=True))

    torch.testing.assert_close(ours, logits_of(by_peft(adapter)), **CLOSE)
    assert (ours - logits_of(imported.base.model)).abs().max() > 1e-3


def test_its_slot_alone_is_plain_peft(imported: Registry, adapter: Path, by_peft: Any, logits_of: Any) -> None:
    model = imported.compose("sailing+cooking")

    with fixed_slots(model, {"sailing": 1.0}):
        ours = logits_of(model)

    torch.testing.assert_close(ours, logits_of(by_peft(adapter)), **CLOSE)


def test_experts_below_the_feature_layer_are_routed_by_tokens(imported: Registry, texts: Any) -> None:
    model = imported.compose("sailing+cooking")
    routing, shares = routing_of(model), {}
    for name in ("sailing", "cooking"):
        text = json.loads(texts[name].read_text(encoding="utf-8").splitlines()[0])["text"]
        with recording_routes(model) as routes:
            model(**imported.tokenizer(text, return_tensors="pt"))
        shares[name] = dict(zip(routing.stack.names, routes[0].slot_gate[0, -1].tolist(), strict=True))

    assert min(imported.show("sailing").experts[0].layers) == 0
    assert shares["sailing"]["sailing"] > shares["sailing"]["cooking"]
    assert shares["cooking"]["cooking"] > shares["cooking"]["sailing"]


def test_older_domains_are_unchanged(imported: Registry, cooking_store: Path, logits_of: Any) -> None:
    before = Registry.open(cooking_store)

    assert imported.show("cooking").to_json() == before.show("cooking").to_json()
    assert torch.equal(logits_of(imported.compose("cooking")), logits_of(before.compose("cooking")))


def test_the_pack_passes_the_strict_reader(imported: Registry) -> None:
    manifest = imported.show("sailing")

    check_pack(imported.store, manifest)

    record = manifest.train["imported"]
    assert record["from"] == "my-adapter"
    assert sorted(record["files"]) == ["adapter_config.json", "adapter_model.safetensors"]
    assert manifest.license == "unknown"


def test_peft_loads_the_imported_pack(
    imported: Registry, adapter: Path, by_peft: Any, tmp_path: Path, logits_of: Any
) -> None:
    pack = imported.save("sailing", tmp_path / "out") / "packs" / "sailing"

    for folder in (pack, pack / "experts" / "e0"):
        torch.testing.assert_close(logits_of(by_peft(folder)), logits_of(by_peft(adapter)), **CLOSE)


def test_its_held_out_text_is_found_again(imported: Registry) -> None:
    scores = imported.evaluate("sailing", questions=False)

    assert scores["sailing"].routed == pytest.approx(imported.show("sailing").evaluation["routed"], abs=1e-4)


def test_the_same_import_gives_the_same_digest(
    imported: Registry, cooking_store: Path, adapter: Path, texts: Any, fresh_copy: Any
) -> None:
    again = fresh_copy(cooking_store).import_adapter("sailing", adapter, data=[texts["sailing"]])

    assert again.manifest.digest == imported.show("sailing").digest


# --- refused ---


@pytest.fixture
def changed(adapter: Path, tmp_path: Path) -> Callable[..., Path]:
    """`changed(key=value)` is a copy of the adapter with other settings."""

    def change(**settings: Any) -> Path:
        folder = shutil.copytree(adapter, tmp_path / "changed")
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")) | settings
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return change


@pytest.fixture
def refused(kp_store: Path, texts: Any, state_of: Any) -> Callable[..., Any]:
    """`refused(error, folder)` imports, expects the error, and makes sure that nothing was stored."""

    def check(kind: type, folder: Path, *, match: str, code: int) -> None:
        registry = Registry.open(kp_store)
        before = state_of(registry.store)
        with pytest.raises(kind, match=match) as refusal:
            registry.import_adapter("sailing", folder, data=[texts["sailing"]])
        assert refusal.value.exit_code == code
        assert state_of(registry.store) == before

    return check


def test_another_base_model_by_name_is_refused(changed: Any, refused: Any) -> None:
    folder = changed(base_model_name_or_path="meta-llama/Llama-3.2-1B")

    refused(IncompatibleError, folder, match="--same-base", code=6)


def test_a_base_model_without_a_name_is_refused(changed: Any, refused: Any) -> None:
    refused(IncompatibleError, changed(base_model_name_or_path=None), match="names None", code=6)


def test_another_base_model_name_is_accepted_with_same_base(changed: Any, kp_store: Path, texts: Any, fresh_copy: Any):
    folder = changed(base_model_name_or_path="somebody/renamed", revision="main")

    added = fresh_copy(kp_store).import_adapter("sailing", folder, data=[texts["sailing"]], same_base=True)

    assert added.manifest.version == 1


def test_a_base_model_folder_is_compared_by_fingerprint(
    changed: Any, refused: Any, base_folder: Path, tiny_llama: Any, tmp_path: Path
) -> None:
    other = shutil.copytree(base_folder, tmp_path / "other")
    tiny_llama(seed=9, vocab_size=300).save_pretrained(other)

    refused(IncompatibleError, changed(base_model_name_or_path=str(other)), match="weights: expected", code=6)


def test_another_revision_is_refused(changed: Any, refused: Any, kp_store: Path) -> None:
    base = Registry.open(kp_store).base_record.id

    refused(IncompatibleError, changed(base_model_name_or_path=base, revision="abc"), match="revision 'abc'", code=6)


def test_dora_is_refused_before_anything_is_loaded(changed: Any, refused: Any) -> None:
    refused(IncompatibleError, changed(use_dora=True), match="use_dora is True: DoRA rescales", code=6)


def test_values_that_are_not_finite_are_refused(changed: Any, refused: Any) -> None:
    folder = changed()
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    refused(IntegrityError, folder, match="not finite", code=5)


def test_a_pickle_is_never_read(changed: Any, refused: Any) -> None:
    folder = changed()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")

    refused(IncompatibleError, folder, match="a pickle", code=6)


def test_a_folder_without_an_adapter_is_not_found(tmp_path: Path, refused: Any) -> None:
    refused(NotFoundError, tmp_path, match="There is no adapter", code=3)


# --- from the Hub ---


def _upload(folder: Path, inside: str = "", *, leave_out: str = "") -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    HfApi().create_repo("acme/mine", exist_ok=True)
    files = [path for path in folder.iterdir() if path.name != leave_out]
    operations = [CommitOperationAdd(inside + path.name, path.read_bytes()) for path in files]
    HfApi().create_commit("acme/mine", operations, commit_message="an adapter")


@pytest.mark.parametrize("inside", ["", "step-100/"])
def test_an_adapter_on_the_hub_is_read_at_one_commit(
    inside: str, local_hub: Any, adapter: Path, changed: Any, kp_store: Path, texts: Any
) -> None:
    registry = Registry.open(kp_store)
    _upload(changed(base_model_name_or_path=registry.base_record.id), inside)

    found = plan_import(
        registry.store, "sailing", f"acme/mine/{inside}".rstrip("/"), [texts["sailing"]], base=registry.base_record
    ).files

    assert found.tensors == (adapter / "adapter_model.safetensors").read_bytes()
    assert found.commit is not None
    assert len(found.commit) == 40
    assert not found.is_local


def test_a_local_path_named_by_an_adapter_from_the_hub_is_not_read(
    local_hub: Any, adapter: Path, kp_store: Path, texts: Any
) -> None:
    _upload(adapter)  # its base model is a folder on the machine it was trained on

    with pytest.raises(IncompatibleError, match="another base model"):
        Registry.open(kp_store).import_adapter("sailing", "acme/mine", data=[texts["sailing"]])


def test_a_pickle_on_the_hub_is_not_even_downloaded(local_hub: Any, changed: Any, kp_store: Path, texts: Any) -> None:
    folder = changed()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    _upload(folder, leave_out="adapter_model.safetensors")

    with pytest.raises(IncompatibleError, match="a pickle"):
        Registry.open(kp_store).import_adapter("sailing", "acme/mine", data=[texts["sailing"]])


def test_a_taken_name_is_refused(imported: Registry, adapter: Path, texts: Any) -> None:
    with pytest.raises(ConflictError):
        imported.import_adapter("cooking", adapter, data=[texts["cooking"]])
