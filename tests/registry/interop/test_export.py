"""Exports of a real registry, loaded by plain PEFT and plain transformers, give the same logits."""

import json
import shlex
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorary.adapters.layer.routing import fixed_slots
from lorary.domains.errors import ConflictError, IncompatibleError, IntegrityError
from lorary.registry import Registry
from lorary.registry.store.blobs import sha256_of_file

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
SEVERAL = "cooking:0.6+sailing:0.3"


@pytest.mark.parametrize("to", ["peft", "vllm"])
@pytest.mark.parametrize(("composition", "static"), [("cooking", False), (SEVERAL, True), ("general", False)])
def test_plain_peft_computes_the_static_composition(
    composition: str, static: bool, to: Any, whole: Registry, by_peft: Any, tmp_path: Path, logits_of: Any
) -> None:
    whole.export(composition, tmp_path / "out", to=to, static=static)

    theirs = logits_of(by_peft(tmp_path / "out"))

    torch.testing.assert_close(theirs, logits_of(whole.compose(composition, static=True)), **CLOSE)
    assert (theirs - logits_of(whole.base.model)).abs().max() > 1e-4


@pytest.mark.parametrize("to", ["peft", "vllm", "merged"])
def test_a_routed_composition_is_not_exported(to: Any, whole: Registry, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match=f"--static --to {to}") as refusal:
        whole.export("cooking+sailing", tmp_path / "out", to=to)

    assert refusal.value.exit_code == 6
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["peft", "vllm", "merged", "tar"])
def test_an_existing_path_is_not_overwritten(to: Any, whole: Registry, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    with pytest.raises(ConflictError):
        whole.export("cooking", tmp_path / "out", to=to)

    assert not list((tmp_path / "out").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_vllm_gets_one_rank_and_no_scale(whole: Registry, tmp_path: Path) -> None:
    exported = whole.export("cooking@1", tmp_path / "a folder", to="vllm", served_base="org/base")

    config = json.loads((tmp_path / "a folder" / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(tmp_path / "a folder" / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (6, 6, {})
    assert config["base_model_name_or_path"] == "org/base"
    assert {tensor.shape[0 if "lora_A" in name else 1] for name, tensor in tensors.items()} == {6}
    words = shlex.split(exported.command)
    assert words[:6] == ["vllm", "serve", "org/base", "--enable-lora", "--max-lora-rank", "8"]
    assert words[6:] == ["--lora-modules", f"cooking-v1={tmp_path / 'a folder'}"]


def test_other_weights_are_served_under_another_name(whole: Registry, tmp_path: Path) -> None:
    names = set()
    for i, composition in enumerate((SEVERAL, "cooking:0.6+sailing:0.4")):
        facts = whole.export(composition, tmp_path / str(i), to="vllm", static=True).facts
        names.add(facts["served_name"])

    assert len(names) == 2
    assert all(str(name).startswith("cooking-v1-sailing-v1-") for name in names)


def test_a_merged_checkpoint_is_the_static_composition(whole: Registry, tmp_path: Path, logits_of: Any) -> None:
    base = whole.base.model
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    exported = whole.export(SEVERAL, tmp_path / "out", to="merged", static=True)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits_of(merged), logits_of(whole.compose(SEVERAL, static=True)), **CLOSE)
    assert merged.state_dict().keys() == before.keys()
    assert float(exported.facts["difference"]) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_a_merged_checkpoint_with_other_logits_is_not_written(
    whole: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorary.registry.interop.export.TOLERANCES", {torch.float32: 1e-12})

    with pytest.raises(IntegrityError, match="differs from the composed model"):
        whole.export(SEVERAL, tmp_path / "out", to="merged", static=True)

    assert not list(tmp_path.iterdir())


def test_an_archive_is_the_same_bytes_every_time(whole: Registry, tmp_path: Path) -> None:
    for name in ("one.tar", "two.tar"):
        whole.export("cooking", tmp_path / name, to="tar")

    assert sha256_of_file(tmp_path / "one.tar") == sha256_of_file(tmp_path / "two.tar")
    with tarfile.open(tmp_path / "one.tar") as archive:
        members = {member.name: member for member in archive.getmembers()}
        read = archive.extractfile("cooking/lorary.json")
        assert read is not None
        assert read.read() == whole.show("cooking").to_json()
    assert list(members) == sorted(members)
    assert len(members) == len(whole.show("cooking").files) + 1
    assert {(m.mtime, m.uid, m.gid, m.mode) for m in members.values()} == {(0, 0, 0, 0o644)}


def test_one_slot_alone_is_what_is_exported(whole: Registry, by_peft: Any, tmp_path: Path, logits_of: Any) -> None:
    whole.export("sailing", tmp_path / "out", to="peft")
    model = whole.compose("cooking+sailing", static=True)

    with fixed_slots(model, {"sailing": 1.0}):
        ours = logits_of(model)

    torch.testing.assert_close(logits_of(by_peft(tmp_path / "out")), ours, **CLOSE)
