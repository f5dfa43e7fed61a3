"""An adapter without text is never routed by nothing: it is composed with constant weights, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.domains.errors import InputError
from lorary.registry import Registry
from lorary.registry.compose.saved import open_plan
from lorary.registry.interop.import_plan import plan_import
from lorary.registry.pack.check_pack import check_pack
from lorary.registry.store.strict_json import canonical_json

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def adapter(save_adapter: Callable[..., Path]) -> Path:
    return save_adapter(seed=9, target_modules="all-linear")


@pytest.fixture(scope="module")
def imported(cooking_store: Path, adapter: Path) -> Registry:
    """KP and `cooking`, with the adapter as `notes`, which has no text; tests only read it."""
    registry = Registry.open(shutil.copytree(cooking_store, cooking_store.with_name("without-text")))
    registry.import_adapter("notes", adapter)
    return registry


def test_it_is_stored_as_not_routed_and_passes_the_strict_reader(imported: Registry) -> None:
    manifest = imported.show("notes")

    assert not manifest.is_routed
    assert imported.show("cooking").is_routed
    assert manifest.train["imported"]["routing"] == "none"
    assert manifest.evaluation == {}
    check_pack(imported.store, manifest)


def test_its_static_composition_is_plain_peft(imported: Registry, adapter: Path, by_peft: Any, logits_of: Any) -> None:
    ours = logits_of(imported.compose("notes", static=True))

    torch.testing.assert_close(ours, logits_of(by_peft(adapter)), **CLOSE)


def test_constant_weights_mix_it_with_a_domain(imported: Registry, logits_of: Any) -> None:
    found = [logits_of(imported.compose(f"notes:{w}+cooking:0.5", static=True)) for w in (1e-6, 0.5)]

    torch.testing.assert_close(found[0], logits_of(imported.compose("cooking:0.5", static=True)), rtol=1e-3, atol=1e-3)
    assert (found[0] - found[1]).abs().max() > 1e-3


def _save_as_routed(registry: Registry, folder: Path) -> Any:
    saved = registry.save("notes", folder, static=True) / "composition.json"
    saved.write_bytes(canonical_json(json.loads(saved.read_bytes()) | {"static": False}))
    slots = json.loads(saved.read_bytes())["slots"]
    saved.write_bytes(canonical_json(json.loads(saved.read_bytes()) | {"slots": [s | {"prior": 0.5} for s in slots]}))
    return open_plan(folder, base=registry.base_record)


@pytest.mark.parametrize(
    "use",
    [
        lambda registry, _: registry.compose("notes"),
        lambda registry, _: registry.compose("cooking+notes"),
        lambda registry, _: registry.plan("notes+general:0.5"),
        lambda registry, folder: registry.save("cooking+notes", folder),
        lambda registry, _: registry.route("butter", "cooking+notes"),
        lambda registry, _: registry.evaluate("cooking+notes"),
        lambda registry, _: registry.retention(["cooking", "notes"]),
        lambda registry, folder: registry.export("cooking+notes", folder, to="peft"),
        lambda registry, _: registry.retrain("notes", data=[{"text": "one"}, {"text": "two"}]),
        _save_as_routed,
    ],
    ids=[
        *("compose", "compose both", "plan", "save", "route", "evaluate", "retention", "export", "retrain"),
        "saved as routed",
    ],
)
def test_every_use_that_would_route_it_is_refused_by_name(use: Any, imported: Registry, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)notes.*imported without text") as caught:
        use(imported, tmp_path / "out")

    assert caught.value.exit_code == 2
    assert "--static" in (caught.value.fix or "") or "--data FILE" in (caught.value.fix or "")


def test_all_domains_are_routed_without_it_and_the_report_says_so(imported: Registry, cooking_store: Path) -> None:
    report = imported.route("whisk the butter")

    assert report.left_out == ("notes",)
    assert "left_out=('notes',)" in repr(report)
    assert report.gates == Registry.open(cooking_store).route("whisk the butter").gates


def test_a_retention_report_of_all_leaves_it_out_by_name(imported: Registry) -> None:
    report = imported.retention(questions=False, max_bytes=500)

    assert "imported without text" in report.left_out["notes"]


def test_a_domain_is_added_beside_it_as_if_it_were_not_there(
    imported: Registry, both_store: Path, tmp_path: Path, texts: Any, short_run: Any
) -> None:
    registry = Registry.open(shutil.copytree(imported.store.path, tmp_path / "store"))
    alone = Registry.open(both_store).show("sailing")

    beside = registry.add_domain("sailing", data=[texts["sailing"]], **short_run())

    assert beside.manifest.digest == alone.digest
    assert beside.manifest.proof["drift"] == alone.proof["drift"]
    assert beside.manifest.proof["chat"] == alone.proof["chat"]
    assert [near.name for near in beside.neighbours] == ["cooking"]
    assert "notes" not in str(beside.manifest.proof)


def test_a_built_in_domain_brings_its_own_text(imported: Registry, adapter: Path) -> None:
    texts = [plan_import(imported.store, name, str(adapter), (), base=None).data for name in ("legal", "contracts")]

    assert texts[0] is not None
    assert texts[1] is None
