"""The form in which a version reads prompts: as turns of the chat template, or as plain text; it is kept for good."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorary.domains.data.catalog import builtin_domains
from lorary.domains.data.corpus import corpus_digest
from lorary.registry import Registry
from lorary.registry.measure.held_out import (
    HeldOut,
    domain_questions,
    find_held_out,
    is_raw,
    read_checked,
    spec_of,
    stored_held_out,
)

ROWS = [{"prompt": f"Is oven {n} hot?", "completion": f"No, it is {n} times as cold as ice."} for n in range(12)]
MORE = [{"prompt": f"Is keel {n} wet?", "completion": f"No, it is {n} times as dry as sand."} for n in range(8)]


@pytest.fixture(scope="module")
def asked(kp_store: Path, tmp_path_factory: Any, short_run: Any) -> Registry:
    """A registry with `plain`, trained on raw prompts, `chat`, and a version of `plain` that was retrained in chat."""
    import shutil

    registry = Registry.open(shutil.copytree(kp_store, tmp_path_factory.mktemp("asked") / "store"))
    registry.add_domain("plain", data=ROWS, raw=True, **short_run(steps=2))
    registry.add_domain("chat", data=ROWS, **short_run(steps=2))
    registry.retrain("plain", data=MORE, tolerance=100.0, training=short_run(steps=2)["training"])
    return registry


@pytest.mark.slow
def test_a_version_records_how_it_reads_prompts(asked: Registry) -> None:
    assert asked.show("chat").train["chat"] is True
    assert "chat" not in asked.show("plain@1").train
    assert [is_raw(asked.show(reference)) for reference in ("chat", "plain@1", "plain@2")] == [False, True, False]
    assert asked.show("chat").train["run"] != asked.show("plain@1").train["run"].replace("plain", "chat")


def test_a_version_that_says_nothing_reads_plain_text(whole: Registry) -> None:
    manifest = whole.show("cooking")
    assert not is_raw(manifest)
    for said in ({}, {"chat": False}, {"chat": "yes"}):
        train = {key: value for key, value in manifest.train.items() if key != "chat"} | said
        assert is_raw(replace(manifest, train=train))
        assert all(row.raw for row in stored_held_out(whole.store, replace(manifest, train=train)))


@pytest.mark.slow
def test_held_out_rows_are_read_as_their_version_was_trained(asked: Registry) -> None:
    raw = {row.prompt: row.raw for row in stored_held_out(asked.store, asked.show("plain@2"))}

    assert {is_plain for prompt, is_plain in raw.items() if "oven" in prompt} == {True}
    assert {is_plain for prompt, is_plain in raw.items() if "keel" in prompt} == {False}
    assert not any(row.raw for row in stored_held_out(asked.store, asked.show("chat")))


@pytest.mark.parametrize("raw", [True, False])
def test_rows_that_are_given_to_evaluate_are_read_as_the_version_reads_them(
    whole: Registry, raw: bool, tmp_path: Path
) -> None:
    path = tmp_path / "given.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in MORE), encoding="utf-8")

    manifest = whole.show("cooking")
    manifest = replace(manifest, train=manifest.train | {"chat": not raw})

    found = find_held_out(whole.store, manifest, data=[path], max_bytes=1000, with_questions=True)

    assert {row.raw for row in found.texts} == {raw}
    bundled = {"digest": corpus_digest(read_checked([builtin_domains()["medicine"].corpus or ""]))}
    medicine = replace(manifest, name="medicine", train=manifest.train | {"data": bundled})
    assert {question.raw for question in domain_questions(whole.store, medicine)} == {raw}


def test_other_text_under_a_built_in_name_is_another_domain(whole: Registry, texts: Any) -> None:
    medicine = replace(whole.show("cooking"), name="medicine")
    spec = spec_of("medicine", [texts["cooking"]])

    assert domain_questions(whole.store, medicine) == []
    assert spec.questions is None
    assert "the user's own data" in spec.description
    assert spec_of("medicine", []) == builtin_domains()["medicine"]
    assert domain_questions(whole.store, replace(medicine, name="general")), "KP is always asked general questions"


@pytest.mark.slow
def test_an_old_version_is_scored_as_before(asked: Registry) -> None:
    plain, chat = asked.evaluate("plain@1")["plain"], asked.evaluate("chat")["chat"]
    with_template = asked.base.tokenizer.chat_template
    asked.base.tokenizer.chat_template = None  # as if there were none
    try:
        assert asked.evaluate("plain@1")["plain"] == plain
        assert asked.evaluate("chat")["chat"].base == pytest.approx(plain.base)
    finally:
        asked.base.tokenizer.chat_template = with_template
    assert chat.base != pytest.approx(plain.base, abs=1e-3)


def test_kept_scores_of_plain_text_and_of_chat_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "The dog ran."}\n', encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")

    def digest(name: str, *, raw: bool) -> str:
        return HeldOut(name="x", texts=tuple(read_checked([tmp_path / name], raw=raw))).digest

    assert digest("rows.jsonl", raw=True) != digest("rows.jsonl", raw=False)
    assert digest("text.jsonl", raw=True) == digest("text.jsonl", raw=False)
