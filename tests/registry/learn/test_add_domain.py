"""Adding a domain: what is refused, with which exit code, and that a refusal leaves the store as it was."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorary.adapters.config import BankConfig, TrainingConfig
from lorary.domains.data.catalog import builtin_domains
from lorary.domains.data.corpus import is_held_out
from lorary.domains.data.rows import Row, to_example
from lorary.domains.errors import (
    ConflictError,
    CorpusError,
    IncompatibleError,
    InputError,
    IntegrityError,
    LoraryError,
    NotFoundError,
)
from lorary.domains.progress import Progress
from lorary.registry import Registry
from lorary.registry.measure.held_out import HELD_OUT, general_examples, read_domain_data, stored_held_out
from lorary.registry.pack.pack import read_pack

ANSWER = {"role": "assistant", "content": "The mast."}


@pytest.fixture
def registry(cooking_store: Path, fresh_copy: Callable[[Path], Registry]) -> Registry:
    """KP and `cooking`, free to be changed."""
    return fresh_copy(cooking_store)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes lines to a file."""

    def write(*lines: str, name: str = "rows.jsonl") -> Path:
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return tmp_path / name

    return write


# --- what is refused ---


@pytest.mark.parametrize(
    ("name", "kind", "code"),
    [
        ("boating", NotFoundError, 3),
        ("cooking", ConflictError, 4),
        ("general", InputError, 2),
        ("latest", InputError, 2),
        ("Sailing", InputError, 2),
        ("../sailing", InputError, 2),
        ("", InputError, 2),
    ],
)
def test_a_name_that_cannot_be_added_without_data_is_refused(
    name: str, kind: type[LoraryError], code: int, registry: Registry, state_of: Any, short_run: Any
) -> None:
    before = state_of(registry.store)

    with pytest.raises(kind) as caught:
        registry.add_domain(name, **short_run())

    assert caught.value.exit_code == code
    assert state_of(registry.store) == before


def test_a_domain_is_never_added_twice(registry: Registry, texts: Any, short_run: Any) -> None:
    with pytest.raises(ConflictError, match="'cooking'") as caught:
        registry.add_domain("cooking", data=[texts["sailing"]], **short_run())

    assert caught.value.exit_code == 4
    assert registry.store.versions("cooking") == [1]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['{"text": "one"}', '{"text": "two"', '{"text": "three"}'], "rows.jsonl:2"),
        (['{"text": "one"}', '{"text": "two"}', "", '{"words": "three"}'], "rows.jsonl:4"),
        (['["one"]'], "rows.jsonl:1"),
        ([], "rows.jsonl: has no rows"),
        (["", ""], "rows.jsonl: has no rows"),
    ],
    ids=["bad JSON", "no known key", "no object", "no line", "blank lines"],
)
def test_bad_data_is_named_by_file_and_line(
    lines: list[str], says: str, registry: Registry, jsonl: Any, state_of: Any
) -> None:
    before = state_of(registry.store)

    with pytest.raises(CorpusError) as caught:
        registry.add_domain("sailing", data=[jsonl(*lines)], bank=BankConfig(expert_free=0.25))

    assert caught.value.exit_code == 2
    assert says in caught.value.message
    assert state_of(registry.store) == before


@pytest.mark.parametrize("held_out", [False, True], ids=["trained on", "held out"])
def test_a_conversation_that_the_template_cannot_show_is_refused_before_training(
    held_out: bool, registry: Registry, jsonl: Any, state_of: Any
) -> None:
    asked = ({"messages": [{"role": "user", "content": f"{i}?", "name": "Ann"}, ANSWER]} for i in range(99))
    row = next(row for row in asked if is_held_out(to_example(Row(1, row), ""), HELD_OUT) == held_out)
    texts = [json.dumps({"text": f"mast and keel {i} " * 20}) for i in range(9)]
    before, stages = state_of(registry.store), set()

    with pytest.raises(CorpusError, match=r"rows.jsonl:10: the chat template ignores messages\[0\].name") as caught:
        registry.add_domain(
            "sailing",
            data=[jsonl(*texts, json.dumps(row))],
            bank=BankConfig(expert_free=0.25),
            on_progress=lambda progress: stages.add(progress.stage),
        )

    assert caught.value.exit_code == 2
    assert state_of(registry.store) == before
    assert not stages


def test_of_many_bad_rows_the_number_is_told(registry: Registry, jsonl: Any) -> None:
    with pytest.raises(CorpusError) as caught:
        registry.add_domain("sailing", data=[jsonl('{"text": "one"}', "{", "}")])

    assert ":2" in caught.value.message
    assert "2 rows" in str(caught.value.cause)
    assert ":3" in str(caught.value.cause)


@pytest.mark.parametrize(
    "lines",
    [['{"text": "mast"}', '{"text": "keel"}'], ['{"text": "mast and keel and rudder"}'], ['{"text": "mast"}'] * 50],
    ids=["few words", "one row", "one row many times"],
)
def test_too_little_data_is_refused(lines: list[str], registry: Registry, jsonl: Any, state_of: Any) -> None:
    before = state_of(registry.store)

    with pytest.raises(InputError, match="needed") as caught:
        registry.add_domain("sailing", data=[jsonl(*lines)], bank=BankConfig(expert_free=0.25))

    assert caught.value.exit_code == 2
    assert state_of(registry.store) == before


def test_a_file_that_is_not_there_is_not_found(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        registry.add_domain("sailing", data=[tmp_path / "nothing.jsonl"])


def test_a_target_module_that_is_not_there_is_refused(registry: Registry, texts: Any) -> None:
    with pytest.raises(InputError, match="'query_proj'"):
        registry.add_domain(
            "sailing", data=[texts["sailing"]], bank=BankConfig(targets=("query_proj",), expert_free=0.25)
        )


def test_a_store_whose_general_bank_is_missing_says_how_to_go_on(
    registry: Registry, texts: Any, short_run: Any
) -> None:
    shutil.rmtree(registry.store.path / "domains" / "general")

    with pytest.raises(NotFoundError, match="no KP bank") as caught:
        registry.add_domain("sailing", data=[texts["sailing"]], **short_run())

    assert "registry init" in str(caught.value.fix)


# --- packs of another base ---


@pytest.fixture(scope="session")
def foreign_store(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, tiny_tokenizer: Any, texts: Any, short_run: Any
) -> Path:
    """A store over other weights of the same shape, with a domain `baking`."""
    folder = tmp_path_factory.mktemp("foreign")
    tiny_llama(seed=1, vocab_size=len(tiny_tokenizer)).save_pretrained(folder / "base")
    tiny_tokenizer.save_pretrained(folder / "base")
    run = short_run(steps=1)
    other = Registry.init(folder / "store", base=str(folder / "base"), data=[texts["general"]], **run)
    other.add_domain("baking", data=[texts["cooking"]], **run)
    return other.store.path


@pytest.fixture
def mixed(registry: Registry, foreign_store: Path) -> Registry:
    """A registry into whose store somebody copied a pack of another base."""
    shutil.copytree(foreign_store / "blobs", registry.store.path / "blobs", dirs_exist_ok=True)
    shutil.copytree(foreign_store / "domains" / "baking", registry.store.path / "domains" / "baking")
    return registry


def test_a_pack_of_another_base_is_not_composed(mixed: Registry) -> None:
    with pytest.raises(IncompatibleError, match="baking@1 belongs to another base") as caught:
        mixed.compose("cooking+baking")

    assert caught.value.exit_code == 6
    assert "weights" in str(caught.value.cause)
    assert mixed.compose("cooking")


def test_a_pack_of_another_base_lends_nothing(mixed: Registry, texts: Any, short_run: Any, state_of: Any) -> None:
    before = state_of(mixed.store)

    with pytest.raises(IncompatibleError, match="baking@1") as caught:
        mixed.add_domain("sailing", data=[texts["sailing"]], **short_run())

    assert caught.value.exit_code == 6
    assert state_of(mixed.store) == before


# --- what is stored ---


def test_only_the_new_domain_is_written(registry: Registry, texts: Any, short_run: Any) -> None:
    before = _files(registry.store.path)

    registry.add_domain("sailing", data=[texts["sailing"]], **short_run(steps=1))

    after = _files(registry.store.path)
    assert {path: after[path] for path in before if not path.startswith("cache/")} == {
        path: data for path, data in before.items() if not path.startswith("cache/")
    }
    new = {path.split("/")[0] + "/" + path.split("/")[1] for path in after.keys() - before.keys()}
    assert {part for part in new if not part.startswith("runs/")} <= {
        "blobs/sha256", "domains/sailing", "cache/fingerprints.json"
    }  # fmt: skip


def test_the_manifest_knows_no_folder_of_the_machine(registry: Registry, texts: Any, short_run: Any) -> None:
    manifest = registry.add_domain("sailing", data=[str(texts["sailing"])], **short_run(steps=1)).manifest

    assert manifest.train["data"]["files"] == ["sailing.jsonl"]
    assert str(texts["sailing"].parent) not in manifest.to_json().decode()


def test_held_out_text_is_found_again_from_another_folder(
    registry: Registry, texts: Any, short_run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(texts["sailing"].parent)
    manifest = registry.add_domain("sailing", data=["sailing.jsonl"], **short_run(steps=1)).manifest
    monkeypatch.chdir(tmp_path)

    assert len(stored_held_out(registry.store, manifest)) == manifest.train["data"]["held_out"]


def test_where_the_data_is_changes_nothing(
    registry: Registry, kp_store: Path, texts: Any, short_run: Any, tmp_path: Path
) -> None:
    moved = shutil.copy(texts["sailing"], tmp_path)
    other = Registry.open(shutil.copytree(kp_store, tmp_path / "other"))
    shutil.rmtree(registry.store.path / "domains" / "cooking")

    digests = {
        registry.add_domain("sailing", data=[texts["sailing"]], **short_run(steps=1)).manifest.digest,
        other.add_domain("sailing", data=[str(moved)], **short_run(steps=1)).manifest.digest,
    }

    assert len(digests) == 1


def test_a_domain_may_be_called_newcomer(registry: Registry, texts: Any, short_run: Any) -> None:
    registry.add_domain("newcomer", data=[texts["sailing"]], **short_run(steps=1))

    assert registry.add_domain("boats", data=[texts["sailing"]], **short_run(steps=1)).drift.domains == 2


@pytest.mark.parametrize(
    "bank",
    [
        BankConfig(rank=1, experts=1.0, rank_gates=False, expert_free=0.25),
        BankConfig(
            rank=3, alpha=5.0, method="rslora", schedule="quarters", targets=("q_proj", "down_proj"), expert_free=0.25
        ),
        BankConfig(rank=2, experts=3.5, schedule="uniform", expert_free=0.9),
    ],
    ids=["without rank gates", "rslora on two targets", "only the last layer"],
)
def test_banks_of_any_shape_compose_with_the_others(
    bank: BankConfig, registry: Registry, texts: Any, logits_of: Any
) -> None:
    training = TrainingConfig(steps=1, block=64, batch=2)
    registry.add_domain("sailing", data=[texts["sailing"]], bank=bank, training=training)

    assert logits_of(registry.compose("cooking+sailing")).isfinite().all()
    assert logits_of(registry.compose("sailing", static=True)).isfinite().all()


@pytest.mark.parametrize(
    ("bank", "training", "said"),
    [
        (BankConfig(rank=33), TrainingConfig(block=64), "32"),
        (BankConfig(), TrainingConfig(block=513), "512"),
        (BankConfig(targets=("query_proj",)), TrainingConfig(block=64), "q_proj"),
    ],
    ids=["a rank above the width", "a block above the context", "no such module"],
)
def test_what_the_base_model_has_no_room_for_is_refused_before_anything_is_read(
    bank: BankConfig, training: TrainingConfig, said: str, registry: Registry, texts: Any
) -> None:
    told: list[Progress] = []
    with pytest.raises(InputError) as caught:
        registry.add_domain("sailing", data=[texts["sailing"]], bank=bank, training=training, on_progress=told.append)

    assert said in str(caught.value.fix)
    assert not [progress for progress in told if progress.stage.startswith("reading")]


def test_experts_in_front_of_what_the_router_reads_are_refused(registry: Registry, texts: Any, state_of: Any) -> None:
    before = state_of(registry.store)

    with pytest.raises(InputError, match="expert_free") as caught:
        registry.add_domain("sailing", data=[texts["sailing"]], bank=BankConfig(expert_free=0.0))

    assert "at least 0.25" in str(caught.value.fix)
    assert state_of(registry.store) == before


def test_statistics_are_of_one_layer_wherever_the_experts_begin(
    registry: Registry, texts: Any, whole: Registry
) -> None:
    bank = BankConfig(rank=2, expert_free=0.75)
    training = TrainingConfig(steps=1, block=64, batch=2)

    manifest = registry.add_domain("sailing", data=[texts["sailing"]], bank=bank, training=training).manifest

    found = read_pack(registry.store, manifest).statistics.tensors()
    expected = read_pack(whole.store, whole.show("sailing")).statistics.tensors()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_training_that_diverges_stores_nothing(registry: Registry, texts: Any, short_run: Any, state_of: Any) -> None:
    before = state_of(registry.store)

    told: list[Progress] = []
    with pytest.raises(IntegrityError, match="diverged") as caught:
        registry.add_domain(
            "sailing", data=[texts["sailing"]], **short_run(learning_rate=1e38, steps=40), on_progress=told.append
        )

    assert "--learning-rate" in str(caught.value.fix)
    assert len([progress for progress in told if progress.stage.startswith("training")]) < 5  # it stops at once
    assert state_of(registry.store) == before
    assert not list(registry.store.runs.glob("sailing-*/checkpoint-*"))


def test_prompts_with_completions_are_learned_too(registry: Registry, jsonl: Any, short_run: Any) -> None:
    rows = [json.dumps({"prompt": f"where is boat {i}?", "completion": f"in harbour {i * 7}."}) for i in range(30)]

    added = registry.add_domain("sailing", data=[jsonl(*rows)], **short_run(steps=1))

    assert added.manifest.train["data"]["rows"] == 30


# --- the data ---


@pytest.mark.parametrize("name", ["sailing", "medicine"])
def test_nobody_told_the_licence_of_the_users_own_text(
    name: str, registry: Registry, texts: Any, short_run: Any
) -> None:
    manifest = registry.add_domain(name, data=[texts["sailing"]], **short_run(steps=1)).manifest

    assert manifest.license == "unknown"
    assert builtin_domains()["medicine"].license == "Apache-2.0"


def test_training_and_held_out_text_have_nothing_in_common(texts: Any) -> None:
    found = read_domain_data(replace(builtin_domains()["general"], corpus=None), [texts["cooking"]])

    assert len(found.train) + len(found.held_out) == 24
    assert not {e.text for e in found.train} & {e.text for e in found.held_out}


def test_general_text_is_the_held_out_part_of_the_bundled_corpus() -> None:
    found = read_domain_data(builtin_domains()["general"], [])

    assert general_examples() == found.held_out
    assert torch.tensor([len(e.text) for e in found.held_out]).sum() > 5000


def _files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
