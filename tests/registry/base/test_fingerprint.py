"""Fingerprints of base models: the same wherever the folder is, another one if anything that counts is another."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorary.domains.errors import IncompatibleError, NotFoundError, RemoteError
from lorary.registry.base.fingerprint import POCKET, find_base, fingerprint
from lorary.registry.store.manifest import BaseRecord, check_same_base


@pytest.fixture
def folder(base_folder: Path, tmp_path: Path) -> Path:
    """A base folder that may be changed."""
    return Path(shutil.copytree(base_folder, tmp_path / "base"))


def record_of(folder: Path, cache: Path | None = None) -> BaseRecord:
    return fingerprint(folder, source=str(folder), cache=cache)


# --- finding ---


def test_the_pocket_base_is_found() -> None:
    folder = find_base(POCKET)

    assert (folder / "model.safetensors").is_file()
    record = fingerprint(folder, source=POCKET)
    assert (record.id, record.revision) == ("pocket", None)
    assert record.architecture.startswith("LlamaForCausalLM sha256:")


def test_a_folder_is_found_also_from_a_relative_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)

    assert find_base("base") == find_base(str(folder)) == folder.resolve()


@pytest.mark.parametrize("source", ["pockt", "./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", ""])
def test_what_is_neither_a_folder_nor_an_id_is_not_found(source: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        find_base(source)

    assert caught.value.exit_code == 3
    assert caught.value.fix


@pytest.mark.parametrize("source", ["not an/id", "owner/", "/name"])
def test_what_cannot_be_the_name_of_a_hub_model_is_not_found(source: str) -> None:
    with pytest.raises(NotFoundError):
        find_base(source)


def test_a_model_that_the_hub_does_not_know_is_not_found(local_hub: Any) -> None:
    with pytest.raises(NotFoundError, match="nobody/nothing") as caught:
        find_base("nobody/nothing")

    assert "hf auth login" in str(caught.value.fix)


def test_a_hub_that_may_not_be_asked_is_no_missing_model() -> None:
    with pytest.raises(RemoteError) as caught:
        find_base("nobody/nothing")

    assert caught.value.fix == "unset HF_HUB_OFFLINE, and repeat the command"


def test_a_hub_that_does_not_answer_is_no_missing_model(local_hub: Any) -> None:
    local_hub.fault("GET ", "drop", times=99)

    with pytest.raises(RemoteError, match="cannot be reached"):
        find_base("nobody/nothing")


# --- what the fingerprint covers ---


def test_it_does_not_depend_on_where_the_folder_is(folder: Path, base_folder: Path) -> None:
    assert record_of(folder) == record_of(base_folder)


def test_it_does_not_depend_on_times_and_on_other_files(folder: Path) -> None:
    before = record_of(folder)
    (folder / "README.md").write_text("A model.", encoding="utf-8")
    os.utime(folder / "model.safetensors", (0, 0))

    assert record_of(folder) == before


def test_a_folder_is_named_by_its_weights(folder: Path) -> None:
    record = record_of(folder)

    assert record.id == "local:" + record.weights.removeprefix("sha256:")[:16]


def weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<|end|>", "<|stop|>"), encoding="utf-8")


def template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")


def template_gone(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return change


CHANGES = {
    "weights": ("weights", weights),
    "tokenizer": ("tokenizer", tokenizer),
    "template": ("chat_template", template),
    "no template": ("chat_template", template_gone),
    "class": ("architecture", config(architectures=["MistralForCausalLM"])),
    "heads": ("architecture", config(num_attention_heads=8)),
    "layers": ("architecture", config(num_hidden_layers=3)),
    "vocabulary": ("architecture", config(vocab_size=301)),
    "activation": ("architecture", config(hidden_act="gelu")),
    "norm": ("architecture", config(rms_norm_eps=1e-3)),
    "rope": ("architecture", config(rope_parameters={"rope_theta": 500.0, "rope_type": "default"})),
    "bias": ("architecture", config(attention_bias=True)),
}


@pytest.mark.parametrize(("part", "change"), CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_files_is_refused_with_both_values(
    part: str, change: Callable[[Path], None], folder: Path
) -> None:
    before = record_of(folder)
    change(folder)
    after = record_of(folder)

    with pytest.raises(IncompatibleError, match="cooking@1 belongs to another base model") as caught:
        check_same_base(wanted=before, found=after, what="cooking@1")

    assert caught.value.exit_code == 6
    assert str(caught.value.cause).startswith(part)
    for record in (before, after):
        assert str(getattr(record, part))[:60] in str(caught.value.cause)


@pytest.mark.parametrize(
    "change",
    [config(transformers_version="9.9"), config(use_cache=False), config(_name_or_path="/somewhere")],
    ids=["version", "cache", "path"],
)
def test_a_change_that_does_not_count_is_none(change: Callable[[Path], None], folder: Path) -> None:
    before = record_of(folder)
    change(folder)

    check_same_base(wanted=before, found=record_of(folder), what="cooking@1")


def test_the_name_alone_may_differ(folder: Path) -> None:
    record = record_of(folder)

    check_same_base(wanted=replace(record, id="org/model", revision="abc"), found=record, what="cooking@1")


def test_the_template_is_found_in_the_tokenizer_config_too(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    digests = set()
    for text in ("{{ a }}", "{{ b }}", [{"name": "default", "template": "{{ a }}"}]):
        path.write_text(json.dumps(settings | {"chat_template": text}), encoding="utf-8")
        digests.add(record_of(folder).chat_template)

    assert len(digests - {None}) == 3


# --- folders that are no base model ---


@pytest.mark.parametrize(
    ("missing", "kind"),
    [
        ("config.json", NotFoundError),
        ("tokenizer.json", NotFoundError),
        ("model.safetensors", IncompatibleError),
    ],
)
def test_an_incomplete_folder_is_refused(missing: str, kind: type[Exception], folder: Path) -> None:
    (folder / missing).unlink()

    with pytest.raises(kind):
        record_of(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(IncompatibleError, match="safetensors"):
        record_of(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_config_that_is_none_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")

    with pytest.raises(NotFoundError):
        record_of(folder)


# --- the cache of digests ---


def test_the_cache_changes_nothing(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"

    assert record_of(folder, cache) == record_of(folder, cache) == record_of(folder)


def test_a_cache_that_knows_all_is_not_written_again(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    record_of(folder, cache)
    before = cache.stat()

    record_of(folder, cache)

    assert cache.stat().st_ino == before.st_ino


def test_a_changed_file_is_noticed_although_it_is_in_the_cache(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    before = record_of(folder, cache)
    weights(folder)

    assert record_of(folder, cache).weights != before.weights


@pytest.mark.parametrize("text", ["", "[1]", "7", '{"a": 1}'])
def test_a_damaged_cache_is_not_used(text: str, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    cache.write_text(text, encoding="utf-8")

    assert record_of(folder, cache) == record_of(folder)
