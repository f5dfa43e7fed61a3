"""The whole path through the front door, on a tiny random base model."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.domains.errors import ConflictError, IncompatibleError, InputError, IntegrityError, NotFoundError
from lorary.registry import BankConfig, Registry
from lorary.registry.store.seals import write_sealed


def test_the_general_bank_comes_first_in_the_list(whole: Registry) -> None:
    assert [(m.name, m.version, m.role) for m in whole.list()] == [
        ("general", 1, "preservation"),
        ("cooking", 1, "domain"),
        ("sailing", 1, "domain"),
    ]


@pytest.mark.parametrize("reference", ["cooking", "cooking@1", "cooking@latest"])
def test_a_reference_names_one_version(reference: str, whole: Registry) -> None:
    assert whole.show(reference) == whole.store.manifest("cooking", 1)


@pytest.mark.parametrize("reference", ["cooking+sailing", "cooking:0.5"])
def test_a_reference_that_names_more_is_refused(reference: str, whole: Registry) -> None:
    with pytest.raises(InputError, match="does not name one version"):
        whole.show(reference)


@pytest.mark.parametrize("reference", ["boating", "cooking@2", "cooking@production"])
def test_a_version_that_is_not_there_is_not_found(reference: str, whole: Registry) -> None:
    with pytest.raises(NotFoundError) as caught:
        whole.compose(reference)

    assert caught.value.exit_code == 3


def test_the_alias_latest_follows_the_commit(whole: Registry) -> None:
    assert {name: whole.store.aliases(name) for name in whole.store.domains()} == {
        name: {"latest": 1} for name in ("cooking", "general", "sailing")
    }


def test_every_stored_file_verifies(whole: Registry) -> None:
    for manifest in whole.list():
        whole.store.verify(manifest)


def test_a_finished_run_leaves_no_checkpoint(whole: Registry) -> None:
    runs = sorted(run for run in whole.store.runs.iterdir() if run.name != "locks")

    assert [run.name.partition("-")[0] for run in runs] == ["cooking", "general", "sailing"]
    assert {path.name for run in runs for path in run.iterdir()} == {"run.json", "rare.safetensors", "seals"}


def test_a_composed_model_is_finite_and_not_the_base(whole: Registry, logits_of: Any) -> None:
    composed = logits_of(whole.compose("cooking+sailing"))

    assert composed.isfinite().all()
    assert not torch.equal(composed, logits_of(whole.base.model))


def test_composing_changes_nothing_of_the_base(whole: Registry, logits_of: Any) -> None:
    before = logits_of(whole.base.model)

    whole.compose("cooking+sailing")

    assert torch.equal(logits_of(whole.base.model), before)


def test_experts_help_on_their_own_text_and_routing_finds_them(whole: Registry) -> None:
    scores = whole.evaluate("cooking+sailing")

    assert list(scores) == ["general", "cooking", "sailing"]
    for name in ("cooking", "sailing"):
        assert scores[name].alone < scores[name].base
        assert scores[name].routed < scores[name].base
        assert (scores[name].routed_right or 0) > 0.5


def test_the_manifest_says_how_the_domain_came_to_be(whole: Registry) -> None:
    manifest = whole.show("sailing")

    assert manifest.base == whole.base_record
    assert manifest.lineage["preservation"]["digest"] == whole.show("general").digest
    assert manifest.train["data"]["files"] == ["sailing.jsonl"]
    assert manifest.train["data"]["rows"] == 24
    assert manifest.train["steps"] == len(manifest.train["losses"]) == 6
    assert manifest.proof["unchanged"] is True
    assert set(manifest.proof["frozen"]) == {"base", "attached", "store", "tensors"}
    assert manifest.allocation["counts"] == [0, 1, 2, 3]
    assert math.isfinite(manifest.evaluation["routed"])


def test_a_registry_is_opened_where_it_was_made(both_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORARY_STORE", str(both_store))

    assert Registry.open().store.domains() == ["cooking", "general", "sailing"]


def test_a_complete_registry_is_not_made_again(cooking_store: Path, base_folder: Path) -> None:
    with pytest.raises(ConflictError) as caught:
        Registry.init(cooking_store, base=str(base_folder))

    assert caught.value.exit_code == 4


def test_an_unfinished_registry_for_another_base_is_not_taken_over(
    tmp_path: Path, base_folder: Path, texts: Any, short_run: Any
) -> None:
    with pytest.raises(InputError):
        Registry.init(tmp_path / "store", base=str(base_folder), data=[_empty(tmp_path)], **short_run())

    with pytest.raises(ConflictError):
        Registry.init(tmp_path / "store", base="pocket", data=[texts["general"]], **short_run())


def test_a_base_model_that_was_edited_in_place_is_refused(
    tmp_path: Path, base_folder: Path, fresh_copy: Any, kp_store: Path, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    folder = _moved_base(fresh_copy(kp_store), base_folder, tmp_path)
    assert Registry.open(tmp_path / "store").compose("general")
    tiny_llama(seed=1, vocab_size=len(tiny_tokenizer)).save_pretrained(folder)

    with pytest.raises(IncompatibleError, match="another base model") as caught:
        Registry.open(tmp_path / "store").compose("general")

    assert caught.value.exit_code == 6
    assert "weights" in str(caught.value.cause)


def test_a_base_model_that_is_gone_is_not_found(
    tmp_path: Path, base_folder: Path, fresh_copy: Any, kp_store: Path
) -> None:
    folder = _moved_base(fresh_copy(kp_store), base_folder, tmp_path)
    folder.rename(tmp_path / "elsewhere")

    with pytest.raises(NotFoundError):
        Registry.open(tmp_path / "store").compose("general")


def test_listing_needs_no_base_model(tmp_path: Path, base_folder: Path, fresh_copy: Any, kp_store: Path) -> None:
    folder = _moved_base(fresh_copy(kp_store), base_folder, tmp_path)
    folder.rename(tmp_path / "elsewhere")

    assert [m.name for m in Registry.open(tmp_path / "store").list()] == ["general"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused(both_store: Path) -> None:
    with pytest.raises(IncompatibleError, match="'cuda'") as caught:
        Registry.open(both_store, device="cuda").compose("cooking")

    assert caught.value.exit_code == 6


def test_a_damaged_blob_is_refused_and_others_still_compose(both_store: Path, fresh_copy: Any, logits_of: Any) -> None:
    registry = fresh_copy(both_store)
    manifest = registry.show("cooking")
    path = registry.store.blobs.path(manifest.file("experts/e1/adapter_model.safetensors").sha256)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)

    with pytest.raises(IntegrityError) as caught:
        registry.compose("cooking")

    assert caught.value.exit_code == 5
    assert str(path) in caught.value.message
    assert logits_of(registry.compose("sailing")).isfinite().all()


def test_a_registry_opens_lists_and_composes_without_peft(both_store: Path) -> None:
    code = (
        "import sys; from lorary.registry import Registry; "
        f"r = Registry.open({str(both_store)!r}); r.list(); assert 'torch' not in sys.modules; "
        "r.route('mast and keel'); assert 'peft' not in sys.modules"
    )

    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr


def _empty(folder: Path) -> Path:
    path = folder / "empty.jsonl"
    path.write_bytes(b"")
    return path


def _moved_base(registry: Registry, base_folder: Path, tmp_path: Path) -> Path:
    """Lets a copied store use a base folder of its own."""

    folder = Path(shutil.copytree(base_folder, tmp_path / "base"))
    path = registry.store.path / "store.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["settings"]["source"] = str(folder)
    write_sealed(path, json.dumps(record).encode())
    return folder


@pytest.mark.parametrize("targets", [None, ("no_such_module",)])
def test_a_base_that_is_refused_leaves_no_store(
    targets: tuple[str, ...] | None, base_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(base_folder, tmp_path / "base"))
    if targets is None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"model_type": "t5"}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")

    with pytest.raises((IncompatibleError, InputError)):
        Registry.init(tmp_path / "store", base=str(folder), bank=BankConfig(targets=targets))

    assert not (tmp_path / "store").exists()
