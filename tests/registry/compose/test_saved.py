"""Saved compositions: a verified folder that opens anywhere and gives the same logits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.domains.errors import ConflictError, IncompatibleError, IntegrityError, LoraryError
from lorary.registry import Registry
from lorary.registry.store.blobs import sha256_of
from lorary.registry.store.strict_json import canonical_json


@pytest.fixture(scope="module")
def saved_once(whole: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole.save("sailing:3+cooking@1", tmp_path_factory.mktemp("saved") / "out")


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A copy of a saved composition for tests that modify it."""
    return Path(shutil.copytree(saved_once, tmp_path / "saved"))


@pytest.mark.parametrize("static", [False, True])
def test_the_logits_are_the_same_bit_for_bit(static: bool, whole: Registry, tmp_path: Path, logits_of: Any) -> None:
    text = "cooking:0.3+sailing:0.6"

    folder = whole.save(text, tmp_path / "out", static=static)

    assert torch.equal(logits_of(whole.compose(str(folder))), logits_of(whole.compose(text, static=static)))


def test_it_opens_without_the_packs_in_the_store(saved: Path, kp_store: Path, whole: Registry, logits_of: Any) -> None:
    other = Registry.open(kp_store)

    assert torch.equal(logits_of(other.compose(str(saved))), logits_of(whole.compose("cooking+sailing:3")))


def test_the_plan_is_that_of_the_composition(saved: Path, whole: Registry) -> None:
    plan, expected = whole.plan(str(saved)), whole.plan("cooking+sailing:3")

    assert plan.slots == expected.slots
    assert plan.pinned == expected.pinned
    assert plan.static is False


def test_it_holds_every_file_of_its_packs_and_nothing_else(saved: Path, whole: Registry) -> None:
    expected = {"composition.json"}
    for manifest in whole.list():
        expected |= {f"packs/{manifest.name}/{path}" for path in ["lorary.json", *(f.path for f in manifest.files)]}

    assert {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()} == expected


def test_other_files_are_never_overwritten(saved: Path, whole: Registry) -> None:
    with pytest.raises(ConflictError) as caught:
        whole.save("cooking", saved)

    assert caught.value.exit_code == 4
    with pytest.raises(ConflictError):
        whole.save("cooking", saved / "composition.json")


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "file", ["experts/e0/adapter_model.safetensors", "router/router.safetensors", "router/router.json"]
)
@pytest.mark.parametrize("damage", [flip_last_byte, Path.unlink], ids=["altered", "missing"])
def test_a_damaged_file_is_refused(file: str, damage: Callable[[Path], None], saved: Path, whole: Registry) -> None:
    damage(saved / "packs" / "cooking" / file)

    with pytest.raises(IntegrityError) as caught:
        whole.compose(str(saved))

    assert caught.value.exit_code == 5


@pytest.mark.parametrize("damage", [flip_last_byte, Path.unlink], ids=["altered", "missing"])
def test_a_damaged_manifest_is_refused(damage: Callable[[Path], None], saved: Path, whole: Registry) -> None:
    damage(saved / "packs" / "cooking" / "lorary.json")

    with pytest.raises(IntegrityError):
        whole.compose(str(saved))


def test_a_pack_under_another_name_is_refused(saved: Path, whole: Registry) -> None:
    document = json.loads((saved / "composition.json").read_text(encoding="utf-8"))
    document["slots"][1]["name"], document["slots"][1]["manifest"] = "sailing", document["slots"][2]["manifest"]
    (saved / "composition.json").write_text(json.dumps(document), encoding="utf-8")

    with pytest.raises(IntegrityError):
        whole.compose(str(saved))


@pytest.mark.parametrize(
    "change",
    [
        {"slots": None},
        {"slots": []},
        {"slots": [{"name": "cooking"}]},
        {"slots": [{"name": "../../etc", "prior": 1.0, "manifest": "sha256:" + 64 * "0"}]},
        {"composition": 3},
        {"composition": "no such+grammar+"},
        {"static": "no"},
    ],
    ids=str,
)
def test_an_altered_description_is_refused(change: dict[str, Any], saved: Path, whole: Registry) -> None:
    document = json.loads((saved / "composition.json").read_text(encoding="utf-8"))
    (saved / "composition.json").write_text(json.dumps(document | change), encoding="utf-8")

    with pytest.raises(LoraryError) as caught:
        whole.compose(str(saved))

    assert caught.value.exit_code in (2, 5)


@pytest.mark.parametrize("prior", ["half", -0.5, True, None])
def test_an_altered_prior_is_refused(prior: Any, saved: Path, whole: Registry) -> None:
    document = json.loads((saved / "composition.json").read_text(encoding="utf-8"))
    document["slots"][0]["prior"] = prior
    (saved / "composition.json").write_text(json.dumps(document), encoding="utf-8")

    with pytest.raises(IntegrityError):
        whole.compose(str(saved))


def test_a_description_that_is_not_an_object_is_refused(saved: Path, whole: Registry) -> None:
    (saved / "composition.json").write_text("[]", encoding="utf-8")

    with pytest.raises(LoraryError):
        whole.compose(str(saved))


def test_a_newer_schema_is_refused(saved: Path, whole: Registry) -> None:
    document = json.loads((saved / "composition.json").read_text(encoding="utf-8"))
    (saved / "composition.json").write_text(json.dumps(document | {"schema": "lorary.composition/2"}), encoding="utf-8")

    with pytest.raises(IncompatibleError) as caught:
        whole.compose(str(saved))

    assert caught.value.exit_code == 6


def test_it_is_refused_over_another_base(
    saved: Path, tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any, texts: Any, short_run: Any
) -> None:
    tiny_llama(seed=1, vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    run = short_run(steps=1)
    other = Registry.init(tmp_path / "other", base=str(tmp_path / "base"), data=[texts["general"]], **run)

    with pytest.raises(IncompatibleError, match="another base model") as caught:
        other.compose(str(saved))

    assert caught.value.exit_code == 6


# --- an attacker can make all digests in a folder agree ---


@pytest.fixture
def reseal() -> Callable[..., None]:
    """Return a function that replaces a pack in a saved composition and updates all digests."""

    def put(folder: Path, name: str, pack: Any) -> None:
        manifest = pack.write_to(folder / "packs" / name)
        document = json.loads((folder / "composition.json").read_text(encoding="utf-8"))
        for slot in document["slots"]:
            if slot["name"] == name:
                slot["manifest"] = sha256_of(manifest.to_json())
        (folder / "composition.json").write_text(json.dumps(document), encoding="utf-8")

    return put


def test_an_altered_pack_with_matching_digests_is_refused(
    saved: Path, whole: Registry, loose: Any, reseal: Any
) -> None:
    pack = loose("cooking")
    config = json.loads(pack.files["experts/e0/adapter_config.json"])
    altered = canonical_json(config | {"lora_alpha": 800.0})
    reseal(saved, "cooking", pack.with_files(**{"experts/e0/adapter_config.json": altered}))

    with pytest.raises(IntegrityError, match="no sound pack"):
        whole.compose(str(saved))


def test_an_unaltered_pack_with_matching_digests_composes(
    saved: Path, whole: Registry, loose: Any, reseal: Any
) -> None:
    reseal(saved, "cooking", loose("cooking"))

    assert whole.compose(str(saved))


def test_a_pack_for_a_deeper_model_is_refused_when_planning(
    saved: Path, whole: Registry, loose: Any, reseal: Any
) -> None:
    reseal(saved, "cooking", loose("cooking").with_manifest(lambda m: m["allocation"]["counts"].append(0)))

    with pytest.raises(IntegrityError, match="different depth"):
        whole.plan(str(saved))


def test_another_version_than_the_pinned_one_is_refused(saved: Path, whole: Registry, loose: Any, reseal: Any) -> None:
    reseal(saved, "cooking", loose("cooking").with_manifest(lambda m: m.update(version=2)))

    with pytest.raises(IntegrityError, match="was changed"):
        whole.plan(str(saved))


@pytest.mark.parametrize("place", ["packs/cooking", "packs/cooking/experts/e0"])
def test_an_extra_file_in_a_pack_is_refused(place: str, saved: Path, whole: Registry) -> None:
    (saved / place / "adapter_model.bin").write_bytes(b"")

    with pytest.raises(IntegrityError, match="more than its manifest names"):
        whole.compose(str(saved))


def test_links_are_not_followed(saved: Path, whole: Registry) -> None:
    (saved / "composition.json").rename(saved.parent / "elsewhere")
    (saved / "composition.json").symlink_to(saved.parent / "elsewhere")

    with pytest.raises(IntegrityError):
        whole.compose(str(saved))
